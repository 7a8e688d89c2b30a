"""Recurrences without a compiled kernel: the reference's, which run anew between the recorded pieces of a step, under
its own plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from anychip.ops.reference import ReferenceStates
from anychip.plugin_api import Recorder, ShapeKey, StateLayer, StateSpec, StateView
from anychip_cpu.graph import Recordings


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
        forward, recording = super().forward, self._recordings.current
        if recording is None or recording.paused:
            return forward(inputs, cache, plan.plan, layer)
        # At every replay as now; the cache is written in place.
        return recording.between(lambda plans, out: forward(inputs, cache, plan.plan, layer)[0], ()), cache
