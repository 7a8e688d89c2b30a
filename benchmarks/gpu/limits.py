"""What a device is, and how fast it copies and multiplies: one line of JSON.

A process of its own, for first_hour.py: the gigabytes that it takes of the device are not an engine's that starts next.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
import triton

from anychip_triton.timing import device_ms

_COPIED_BYTES, _WIDTH = 4 << 30, 8192


def device() -> dict[str, Any]:
    found = torch.cuda.get_device_properties(0)
    return {
        "device": found.name, "memory": found.total_memory, "multiprocessors": found.multi_processor_count,
        "cuda": torch.version.cuda, "triton": triton.__version__,
    }  # fmt: skip


def limits() -> dict[str, float]:
    """bytes/s of a kernel that copies, read and written; operations/s of a bf16 product of 8192 x 8192 x 8192."""
    source, target = (torch.randn(_COPIED_BYTES // 4, dtype=torch.float32, device="cuda") for _ in range(2))
    # Not copy_: in a graph, that is a copy engine's work, which is slower than a kernel's.
    copied_s = device_ms(partial(torch.neg, source, out=target), 5) / 1e3
    x, y = (torch.randn(_WIDTH, _WIDTH, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    multiplied_s = device_ms(partial(torch.matmul, x, y), 5) / 1e3
    return {"bytes_per_s": 2 * _COPIED_BYTES / copied_s, "operations_per_s": 2 * _WIDTH**3 / multiplied_s}


if __name__ == "__main__":
    print(json.dumps({"device": device(), "limits": limits()}))
