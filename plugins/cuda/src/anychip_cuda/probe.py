"""NVIDIA devices, asked through NVML. Needs no driver to import, and no torch."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from anychip.plugin_api import DeviceInfo, ProbeResult
from anychip_triton.visibility import visible

_LIBRARY = "libnvidia-ml.so.1"
_OK = 0
_TEXT_BYTES = 96


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def probe() -> ProbeResult:
    try:
        nvml = ctypes.CDLL(_LIBRARY)
    except OSError:
        return ProbeResult(
            reason=f"no NVIDIA driver ({_LIBRARY} is not there)",
            remedy="install the NVIDIA driver; in a container, start it with the NVIDIA runtime",
        )
    status = nvml.nvmlInit_v2()
    if status != _OK:
        return ProbeResult(
            reason=f"NVML does not start (status {status})", remedy="see whether nvidia-smi lists a device"
        )
    try:
        return _devices(nvml)
    finally:
        nvml.nvmlShutdown()


def _devices(nvml: ctypes.CDLL) -> ProbeResult:
    count = ctypes.c_uint()
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    handles = [ctypes.c_void_p() for _ in range(count.value)]
    opened = [nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(handle)) == _OK for i, handle in enumerate(handles)]
    uuids = [_text(nvml.nvmlDeviceGetUUID, handle) if ok else "" for handle, ok in zip(handles, opened, strict=True)]
    seen = visible(os.environ.get("CUDA_VISIBLE_DEVICES"), uuids)
    found = tuple(_info(nvml, index, handles[at]) for index, at in enumerate(seen) if opened[at])
    driver = ctypes.create_string_buffer(_TEXT_BYTES)
    nvml.nvmlSystemGetDriverVersion(driver, _TEXT_BYTES)
    none = f"CUDA_VISIBLE_DEVICES hides all {len(handles)} devices" if handles else "the NVIDIA driver lists no device"
    return ProbeResult(
        devices=found,
        reason="" if found else none,
        remedy="" if found else "check CUDA_VISIBLE_DEVICES and nvidia-smi",
        versions={"driver": driver.value.decode()},
    )


def _info(nvml: ctypes.CDLL, index: int, handle: ctypes.c_void_p) -> DeviceInfo:
    memory, major, minor = _Memory(), ctypes.c_int(), ctypes.c_int()
    nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    return DeviceInfo(
        index=index,
        name=_text(nvml.nvmlDeviceGetName, handle),
        total_memory=int(memory.total) or None,
        detail=f"compute capability {major.value}.{minor.value}",
    )


def _text(function: Callable[..., int], handle: ctypes.c_void_p) -> str:
    buffer = ctypes.create_string_buffer(_TEXT_BYTES)
    function(handle, buffer, _TEXT_BYTES)
    return buffer.value.decode()
