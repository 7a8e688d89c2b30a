"""NVIDIA devices, asked through NVML. Needs no driver to import, and no torch."""

from __future__ import annotations

import ctypes

from anychip.plugin_api import DeviceInfo, ProbeResult

_LIBRARY = "libnvidia-ml.so.1"
_OK = 0
_NAME_BYTES = 96


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
    found = []
    for index in range(count.value):
        handle, name, memory = ctypes.c_void_p(), ctypes.create_string_buffer(_NAME_BYTES), _Memory()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != _OK:
            continue
        nvml.nvmlDeviceGetName(handle, name, _NAME_BYTES)
        nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        found.append(DeviceInfo(index=index, name=name.value.decode(), total_memory=int(memory.total) or None))
    driver = ctypes.create_string_buffer(_NAME_BYTES)
    nvml.nvmlSystemGetDriverVersion(driver, _NAME_BYTES)
    return ProbeResult(
        devices=tuple(found),
        reason="" if found else "the NVIDIA driver lists no device",
        remedy="" if found else "check CUDA_VISIBLE_DEVICES and nvidia-smi",
        versions={"driver": driver.value.decode()},
    )
