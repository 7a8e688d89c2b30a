"""What the manifest names beside the platform: --device-opt settings, limits, the workers' environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anychip.plugin_api import Decision, Placement, PluginOptions, ProbeResult

if TYPE_CHECKING:
    from anychip.config import EngineConfig

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""torch imports every installed backend of a device by itself unless this is 0."""

GRAPHS = ("full", "pieces", "off")
ATTENTION = ("fused", "plain")


@dataclass(frozen=True, kw_only=True)
class AscendOptions(PluginOptions):
    graphs: str = field(
        default="full",
        metadata={"help": "full: decode steps as whole graphs; pieces: attention between graphs; off: eager"},
    )
    attention: str = field(
        default="fused",
        metadata={"help": "fused: the vendor's op where it serves the layer; plain: core's reference, slow, any layer"},
    )
    nz: bool = field(
        default=True,
        metadata={"help": "dense and int8 weights in the layout FRACTAL_NZ; off: as the checkpoint has them"},
    )
    hccl_buffer_mib: int = field(
        default=200, metadata={"help": "memory that each group of ranks takes for sending, and again for receiving"}
    )

    def __post_init__(self) -> None:
        for name, choices in (("graphs", GRAPHS), ("attention", ATTENTION)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if not 1 <= self.hccl_buffer_mib <= 4096:
            raise ValueError(f"hccl_buffer_mib={self.hccl_buffer_mib}: choose 1 to 4096")


def negotiate(config: EngineConfig, probe: ProbeResult) -> Decision:
    """Steps as large as keep such a device busy; core's own limits are a host's."""
    return Decision(fill={"max_num_seqs": 256, "max_num_batched_tokens": 8192})


def worker_env(config: EngineConfig, placement: Placement) -> Mapping[str, str]:
    """Workers import the vendor's runtime where it is listed, after core has looked at torch, and not within `import
    torch`, which fails whole where CANN is missing."""
    return {} if os.environ.get(AUTOLOAD) == "0" else {AUTOLOAD: "0"}
