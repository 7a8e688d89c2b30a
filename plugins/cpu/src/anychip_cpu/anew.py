"""Backends without compiled kernels: rows of another dtype than their queries, and rare recurrences. Their calls have
another form at every step, so they run anew between the recorded pieces of a step, under its own plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from anychip.ops.reference import ReferenceStates
from anychip.plugin_api import (
    BatchView,
    IndexInputs,
    KVLayout,
    LatentBackend,
    LatentLayer,
    Recorder,
    Rope,
    ShapeKey,
    StateLayer,
    StateSpec,
    StateView,
)
from anychip.plugin_api.cache import Cache
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


def run_anew(
    recordings: Recordings, renewed: Renewed, cache: Any, call: Callable[[Any], tuple[Tensor, Any]]
) -> tuple[Tensor, Any]:
    """call(plan), and while a step is recorded at every replay of it. The cache is written in place."""
    recording = recordings.current
    if recording is None or recording.paused:
        return call(renewed.plan)
    return recording.between(lambda plans, out: call(renewed.plan)[0], ()), cache


class AnewLatent(LatentBackend):
    """Any latent backend, whose caches, forms and sums it leaves as they are."""

    def __init__(self, backend: LatentBackend, recordings: Recordings) -> None:
        super().__init__(backend.spec)
        self.name = backend.name
        self._backend = backend
        self._recordings = recordings

    def kv_layout(self) -> KVLayout:
        return self._backend.kv_layout()

    def make_cache(self, raw: Tensor, num_blocks: int, block_size: int) -> Cache:
        return self._backend.make_cache(raw, num_blocks, block_size)

    def plan(
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: object | None = None,
        recorder: Recorder | None = None,
    ) -> Renewed:
        plan = self._backend.plan(batch, shape, group=group)
        return Renewed(plan, int(batch.query_start[-1])).into(into)

    def forward(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        cache: Cache,
        plan: Renewed,
        layer: LatentLayer,
        *,
        rope: Rope | None = None,
        chosen: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        forward = self._backend.forward
        return run_anew(
            self._recordings, plan, cache,
            lambda now: forward(
                q_nope, q_rope, latent, k_rope, cache, now, layer, rope=rope, chosen=chosen, out=out
            ),
        )  # fmt: skip

    def choose(
        self, index: IndexInputs, cache: Cache, plan: Renewed, layer: LatentLayer, *, rope: Rope | None = None
    ) -> tuple[Tensor, Cache]:
        choose = self._backend.choose
        return run_anew(self._recordings, plan, cache, lambda now: choose(index, cache, now, layer, rope=rope))

    def copy_blocks(self, cache: Cache, src: Sequence[int], dst: Sequence[int]) -> Cache:
        return self._backend.copy_blocks(cache, src, dst)

    def zero_blocks(self, cache: Cache, ids: Sequence[int]) -> Cache:
        return self._backend.zero_blocks(cache, ids)

    def export_arrays(self, cache: Cache, ids: Sequence[int]) -> dict[str, Tensor]:
        return self._backend.export_arrays(cache, ids)

    def import_arrays(self, cache: Cache, ids: Sequence[int], arrays: Mapping[str, Tensor]) -> Cache:
        return self._backend.import_arrays(cache, ids, arrays)


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
