"""The part of a platform that Triton kernels decide: factories and ops, on whatever device the subclass drives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from anychip.ops.reference import WidenedMoE, can_widen, with_wide_scales
from anychip.plugin_api import (
    AttentionBackend,
    AttentionSpec,
    FusedMoE,
    LinearKernel,
    LinearSpec,
    MoESpec,
    Platform,
    PlatformContext,
)
from anychip_triton.attention import TritonAttention
from anychip_triton.launch import JitLauncher
from anychip_triton.linear import linear_kernel
from anychip_triton.low_rank import TritonLowRank
from anychip_triton.moe import TritonMoE, unserved
from anychip_triton.ops import TritonOps
from anychip_triton.targets import Target
from anychip_triton.tiles import TileTable, load_table


class TritonPlatform(Platform):
    """Subclasses say what they run on: `find_target`, capabilities, memory, streams, graphs, communicators."""

    def __init__(self, context: PlatformContext) -> None:
        super().__init__(context)
        target = self.find_target()
        self.launch = JitLauncher(target, self.find_tiles(target))

    @abstractmethod
    def find_target(self) -> Target:
        """What kernels are compiled for. Raises Unsupported with every reason where there is no such."""

    def find_tiles(self, target: Target) -> TileTable:
        """The table of tile sizes."""
        return load_table(target.name, self.made_with())

    def made_with(self) -> Mapping[str, str]:
        """Versions by which a measured tile table is known to be of this machine."""
        import triton

        return {"triton": triton.__version__, **self.context.probe.versions}

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        self.check(spec)
        return TritonAttention(spec, self.launch)

    def linear(self, spec: LinearSpec) -> LinearKernel:
        self.check(spec)
        return linear_kernel(with_wide_scales(spec), self, self.launch, formats="residual_norm_quant" in self.ops())

    def moe(self, spec: MoESpec) -> FusedMoE:
        self.check(spec)
        spec = with_wide_scales(spec)
        if unserved(spec):
            assert spec.scheme is not None, "the kernels serve plain experts"
            # The reference reads on the host which experts a step needs: no graph holds that.
            return WidenedMoE(spec, self, self.moe) if can_widen(spec.scheme) else self.reference.moe(spec, self)
        return TritonMoE(spec, self, self.launch)

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        return {**TritonOps(self.launch).overrides(), "add_low_rank": TritonLowRank(self.launch).add_low_rank}
