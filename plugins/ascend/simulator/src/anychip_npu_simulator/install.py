"""Puts the simulator in place: the libraries, the vendor's wheel over them, and the kernels of every op.

Once a process, before anything of torch_npu is used. Nothing of torch or of core is patched: kernels are registered by
torch's own registry, libraries are found by the loader under the names that the wheel asks for.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from anychip_npu_simulator import cann
from anychip_npu_simulator.errors import SimulatorUnavailable

_kept: list[Any] = []
"""The registrations and the functions that C calls: gone with the process."""


def install() -> None:
    """Idempotent. Raises SimulatorUnavailable without torch_npu or gcc, or where a real torch_npu was loaded before."""
    if _kept:
        return
    if "torch_npu" in sys.modules:
        raise SimulatorUnavailable("torch_npu is loaded already, over another CANN; install the simulator first")
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    os.environ["TASK_QUEUE_ENABLE"] = "0"  # what the vendor's C++ issues has happened when it returns
    library = cann.load()
    import torch
    import torch_npu  # noqa: F401

    from anychip_npu_simulator import aten, hooks, kernels

    _kept.append(hooks.install(library))
    for namespace, install_kernels in (("aten", aten.install), ("npu", kernels.install)):
        registry = torch.library.Library(namespace, "IMPL")
        install_kernels(registry)
        _kept.append(registry)
