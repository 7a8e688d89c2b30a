from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from anychip.ops.reference import REFERENCE
from anychip.plugin_api import PlatformContext, ProbeResult
from anychip_cpu import MANIFEST, CpuOptions
from anychip_cpu.platform import CpuPlatform

sys.path.append(str(Path(__file__).parent))  # tests share what makes their batches


@pytest.fixture(scope="session")
def open_cpu() -> Callable[..., CpuPlatform]:
    """Opens the platform with a variant of its kernels, and so many threads."""

    def opened(isa: str = "", threads: int = 1) -> CpuPlatform:
        options = CpuOptions(isa=isa, threads=threads)
        return CpuPlatform(
            PlatformContext(
                manifest=MANIFEST, device_indexes=(0,), options=options, probe=ProbeResult(), reference=REFERENCE
            )
        )

    return opened
