"""What manifests of platforms on torch.cuda name: --device-opt settings and limits. Imports no runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anychip.plugin_api import Decision, PluginOptions, ProbeResult

if TYPE_CHECKING:
    from anychip.config import EngineConfig


@dataclass(frozen=True, kw_only=True)
class GpuOptions(PluginOptions):
    graphs: bool = field(
        default=True, metadata={"help": "capture decode steps as graphs, each when it is first needed; off: eager"}
    )
    chain: bool = field(
        default=True,
        metadata={"help": "a kernel begins while the one before it ends, where the device can; off: after it"},
    )
    compile: bool = field(
        default=False,
        metadata={"help": "norms and activations by torch.compile instead of hand-written kernels"},
    )


def gpu_limits(config: EngineConfig, probe: ProbeResult) -> Decision:
    """Steps as large as keep a GPU busy; core's own limits are a host's."""
    return Decision(fill={"max_num_seqs": 512, "max_num_batched_tokens": 8192})
