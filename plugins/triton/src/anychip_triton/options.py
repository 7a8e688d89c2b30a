"""--device-opt settings of platforms on torch.cuda. Imports no runtime: manifests name them."""

from __future__ import annotations

from dataclasses import dataclass, field

from anychip.plugin_api import PluginOptions


@dataclass(frozen=True, kw_only=True)
class GpuOptions(PluginOptions):
    graphs: bool = field(
        default=True, metadata={"help": "capture decode steps as graphs, each when it is first needed; off: eager"}
    )
    compile: bool = field(
        default=False,
        metadata={"help": "norms and activations by torch.compile instead of hand-written kernels"},
    )
