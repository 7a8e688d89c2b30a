"""Backends whose calls have another form at every step. They run anew between the recorded pieces of a step, under its
own plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from anychip.ops.reference import ReferenceStates
from anychip.plugin_api import (
    BatchView,
    LatentLayer,
    LatentSpec,
    Recorder,
    Rope,
    ShapeKey,
    StateLayer,
    StateSpec,
    StateView,
)
from anychip_cpu.graph import Recordings
from anychip_cpu.latent_kernel import KernelLatent
from anychip_cpu.native import Kernels


@dataclass(slots=True)
class Renewed:
    """The plan of the newest step."""

    plan: Any
    num_tokens: int
    """Of rows: behind them is padding."""

    def into(self, held: object | None) -> Renewed:
        """Takes the place of what a captured step holds."""
        if not isinstance(held, Renewed):
            return self
        held.plan, held.num_tokens = self.plan, self.num_tokens
        return held


def run_anew(
    recordings: Recordings, renewed: Renewed, cache: Any, call: Callable[[Any], tuple[Tensor, Any]]
) -> tuple[Tensor, Any]:
    """call(plan), and while a step is recorded at every replay of it. The cache is written in place."""
    recording = recordings.current
    if recording is None or recording.paused:
        return call(renewed.plan)
    return recording.between(lambda plans, out: call(renewed.plan)[0], ()), cache


class AnewLatent(KernelLatent):
    def __init__(self, spec: LatentSpec, kernels: Kernels, name: str, recordings: Recordings) -> None:
        super().__init__(spec, kernels, name)
        self._recordings = recordings

    def plan(  # type: ignore[override]
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: object | None = None,
        recorder: Recorder | None = None,
    ) -> Renewed:
        plan = super().plan(batch, shape, group=group)
        return Renewed(plan, int(batch.query_start[-1])).into(into)

    def forward(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        cache: Tensor,
        plan: Renewed,
        layer: LatentLayer,
        *,
        rope: Rope | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        forward = super().forward
        return run_anew(
            self._recordings, plan, cache,
            lambda now: forward(q_nope, q_rope, latent, k_rope, cache, now, layer, rope=rope, out=out),
        )  # fmt: skip


class AnewStates(ReferenceStates):
    def __init__(self, spec: StateSpec, recordings: Recordings) -> None:
        super().__init__(spec)
        self._recordings = recordings

    def plan(  # type: ignore[override]
        self,
        view: StateView,
        shape: ShapeKey,
        *,
        group: int,
        into: object | None = None,
        recorder: Recorder | None = None,
    ) -> Renewed:
        plan = super().plan(view, shape, group=group)
        return Renewed(plan, int(view.query_start[-1])).into(into)

    def forward(  # type: ignore[override]
        self, inputs: Mapping[str, Tensor], cache: Any, plan: Renewed, layer: StateLayer
    ) -> tuple[Tensor, Any]:
        forward = super().forward
        return run_anew(self._recordings, plan, cache, lambda now: forward(inputs, cache, now, layer))
