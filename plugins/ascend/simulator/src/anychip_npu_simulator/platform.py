"""anychip-ascend's platform over the simulator: the plugin's own code, every line of it, on simulated devices."""

from __future__ import annotations

from anychip_npu_simulator.install import install

install()

from anychip.plugin_api import PeakMemory  # noqa: E402
from anychip_ascend.platform import AscendPlatform  # noqa: E402

_KV_BYTES = 64 << 20
"""What is simulated is small."""


class SimulatedAscendPlatform(AscendPlatform):
    profiled_tokens = 8

    def kv_budget(self, profile: PeakMemory) -> int | None:
        return _KV_BYTES
