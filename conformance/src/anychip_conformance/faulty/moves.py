"""Faults of lists that meet, of what was moved and is looked at later, of steps fetched late, and of groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anychip.ops.reference import ReferenceLatent
from anychip.plugin_api import HostOutputs
from anychip_conformance.fakes.hostlen import HostlenGraphs
from anychip_conformance.fakes.static import DonatedState, StaticHidden, StaticStepProgram
from anychip_conformance.faulty.later import Calls, Scratch
from anychip_conformance.faulty.plain import PlainAttention
from anychip_conformance.faulty.ranks import Wrapped
from anychip_conformance.faulty.registry import fault
from anychip_conformance.faulty.states import PlainStates, States

# -- pools ----------------------------------------------------------------------------------------------------


@fault("kv-copies-one-after-the-other", "attention", killed_by="kv.copies_that_meet.001")
class CopiesOneAfterTheOther(PlainAttention):
    """Each copy reads what the copies before it have written."""

    def copy_blocks(self, cache: Tensor, src: Sequence[int], dst: Sequence[int]) -> Tensor:
        for source, destination in zip(src, dst, strict=True):
            cache[destination] = cache[source]
        return cache


@fault("kv-copies-from-the-last", "attention", killed_by="kv.copies_that_meet.005")
class CopiesFromTheLast(PlainAttention):
    """As memmove for rising ids: the last copy first."""

    def copy_blocks(self, cache: Tensor, src: Sequence[int], dst: Sequence[int]) -> Tensor:
        for source, destination in zip(reversed(src), reversed(dst), strict=True):
            cache[destination] = cache[source].clone()
        return cache


@fault("kv-one-copy-of-a-source", "attention", killed_by="kv.copies_that_meet.011")
class OneCopyOfASource(PlainAttention):
    """A table by source keeps one destination of each."""

    def copy_blocks(self, cache: Tensor, src: Sequence[int], dst: Sequence[int]) -> Tensor:
        by_source = dict(zip(src, dst, strict=True))
        return super().copy_blocks(cache, list(by_source), list(by_source.values()))


@fault("kv-export-without-repeats", "attention", killed_by="kv.repeated_ids.001")
class ExportWithoutRepeats(PlainAttention):
    """An id that stands twice is exported once, and zeros stand for the rest."""

    def export_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        found = super().export_blocks(cache, ids).clone()
        for place, block in enumerate(ids):
            if block in list(ids)[:place]:
                found[place] = 0
        return found


@fault("kv-export-is-a-view", "attention", killed_by="kv.exports_stay.002")
class ExportIsAView(PlainAttention):
    """Blocks that follow each other are exported as a slice of the pool."""

    def export_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        given = list(ids)
        if given and given == list(range(given[0], given[0] + len(given))):
            return cache[given[0] : given[0] + len(given)]
        return super().export_blocks(cache, ids)


@fault("kv-import-kept-for-later", "attention", killed_by="kv.exports_stay.001")
class ImportKeptForLater(PlainAttention):
    """Imported blocks are written when the pool is used next."""

    _waiting: tuple[list[int], Tensor] | None = None

    def import_blocks(self, cache: Tensor, ids: Sequence[int], data: Tensor) -> Tensor:
        cache = self._settled(cache)
        self._waiting = (list(ids), data)
        return cache

    def _settled(self, cache: Tensor) -> Tensor:
        if self._waiting is not None:
            ids, data = self._waiting
            self._waiting = None
            cache[ids] = data.view(cache.dtype) if data.dtype != cache.dtype else data
        return cache

    def export_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        return super().export_blocks(self._settled(cache), ids)

    def copy_blocks(self, cache: Tensor, src: Sequence[int], dst: Sequence[int]) -> Tensor:
        return super().copy_blocks(self._settled(cache), src, dst)

    def zero_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        return super().zero_blocks(self._settled(cache), ids)


@fault("latent-copies-one-after-the-other", "latent", killed_by="kv.copies_that_meet.033")
class LatentCopiesOneByOne(ReferenceLatent):
    """Each copy reads what the copies before it have written."""

    def copy_blocks(self, cache: Tensor, src: Sequence[int], dst: Sequence[int]) -> Tensor:
        for source, destination in zip(src, dst, strict=True):
            cache[destination] = cache[source]
        return cache


@fault("latent-export-is-a-view", "latent", killed_by="kv.exports_stay.007")
class LatentExportIsAView(ReferenceLatent):
    """A single block is exported as it lies in the pool."""

    def export_arrays(self, cache: Tensor, ids: Sequence[int]) -> dict[str, Tensor]:
        given = list(ids)
        return {"latent": cache[given[0] : given[0] + 1]} if len(given) == 1 else super().export_arrays(cache, ids)


@fault("state-copies-one-after-the-other", "state", killed_by="kv.copies_that_meet.041")
class StateCopiesOneByOne(PlainStates):
    """Each copy reads what the copies before it have written."""

    def copy_blocks(self, cache: States, src: Sequence[int], dst: Sequence[int]) -> States:
        for held in cache.values():
            for source, destination in zip(src, dst, strict=True):
                held[destination] = held[source]
        return cache


@fault("state-export-is-a-view", "state", killed_by="kv.exports_stay.010")
class StateExportIsAView(PlainStates):
    """States of blocks that follow each other are exported as they lie in the pool."""

    def export_arrays(self, cache: States, ids: Sequence[int]) -> dict[str, Tensor]:
        given = list(ids)
        if given and given == list(range(given[0], given[0] + len(given))):
            return {name: held[given[0] : given[0] + len(given)] for name, held in cache.items()}
        return super().export_arrays(cache, ids)

    def import_arrays(self, cache: States, ids: Sequence[int], arrays: Mapping[str, Tensor]) -> States:
        return super().import_arrays(cache, ids, {name: values.clone() for name, values in arrays.items()})


# -- steps ----------------------------------------------------------------------------------------------------


@fault("step-first-copy-into-a-block-counts", "step", killed_by="step.copies_in_order.001")
class FirstCopyCounts(StaticStepProgram):
    """A table by destination keeps the first of two copies into one block."""

    def edit(self, state: DonatedState, copies: Sequence[tuple[int, int]], zeros: Sequence[int]) -> DonatedState:
        first: dict[int, int] = {}
        for source, destination in copies:
            first.setdefault(destination, source)
        return super().edit(state, [(source, destination) for destination, source in first.items()], zeros)


class Late:
    """Results that are made when they are fetched."""

    def __init__(self, make: Callable[[], HostOutputs]) -> None:
        self.fetch = make


@fault("step-results-in-one-buffer", "step", killed_by="step.late_fetch.001")
class ResultsInOneBuffer(StaticStepProgram):
    """Ids come to the host in storage that the next step writes."""

    def sample(self, state: DonatedState, hidden: StaticHidden, late: Any) -> Any:
        state, drawn = super().sample(state, hidden, late)
        self._ids = getattr(self, "_ids", np.zeros(self.limits.max_num_reqs + 1, dtype=np.int32))
        count = len(drawn.host.token_ids)
        self._ids[:count] = drawn.host.token_ids
        return state, Late(lambda: dataclasses.replace(drawn.host, token_ids=self._ids[:count].copy()))


@fault("step-logprobs-of-the-newest", "step", killed_by="step.late_fetch.001")
class LogprobsOfTheNewest(StaticStepProgram):
    """Log-probabilities are fetched from where the newest step has put its own."""

    def sample(self, state: DonatedState, hidden: StaticHidden, late: Any) -> Any:
        state, drawn = super().sample(state, hidden, late)
        host = drawn.host
        if host.chosen_logprobs is None:
            return state, drawn
        self._chosen = getattr(self, "_chosen", np.zeros(self.limits.max_num_reqs + 1, dtype=np.float32))
        count = len(host.chosen_logprobs)
        self._chosen[:count] = host.chosen_logprobs
        return state, Late(lambda: dataclasses.replace(host, chosen_logprobs=self._chosen[:count].copy()))


@fault("step-fetched-once", "step", killed_by="step.late_fetch.001")
class FetchedOnce(StaticStepProgram):
    """What is fetched a second time is gone."""

    def sample(self, state: DonatedState, hidden: StaticHidden, late: Any) -> Any:
        state, drawn = super().sample(state, hidden, late)
        left = [drawn.host]

        def fetch() -> HostOutputs:
            gone = dataclasses.replace(drawn.host, token_ids=np.zeros_like(drawn.host.token_ids))
            return left.pop() if left else gone

        return state, Late(fetch)


@fault("step-128th-forgets-a-slot", "step", killed_by="step.long_run.001")
class ForgetsASlot(StaticStepProgram):
    """Every 128th step loses what the slots drew last."""

    num_steps = 0

    def sample(self, state: DonatedState, hidden: StaticHidden, late: Any) -> Any:
        state, drawn = super().sample(state, hidden, late)
        self.num_steps += 1
        if self.num_steps % 128:
            return state, drawn
        held = state.take()
        return DonatedState(dataclasses.replace(held, last_ids=torch.zeros_like(held.last_ids))), drawn


# -- groups ---------------------------------------------------------------------------------------------------


@fault("graph-collective-left-out", "graphs", killed_by="graph.collectives.001")
class CollectiveLeftOut(HostlenGraphs):
    """A collective runs at the capture, and at no replay."""

    def collective(self, run: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        recording = self.recording
        if recording is None:
            return run(*arguments)
        recording.paused = True
        try:
            return run(*arguments)
        finally:
            recording.paused = False


@fault("graph-collective-of-the-capture", "graphs", killed_by="graph.collectives.001")
class CollectiveOfTheCapture(HostlenGraphs):
    """A replayed collective sends what its input held at the capture."""

    def collective(self, run: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if self.recording is None:
            return run(*arguments)
        self.recording.paused = True
        fixed = tuple(given.clone() if isinstance(given, Tensor) else given for given in arguments)
        self.recording.paused = False

        def again(*_: Any) -> Any:
            return run(*(given.clone() if isinstance(given, Tensor) else given for given in fixed))

        return super().collective(again, arguments)


@fault("comm-gathered-in-one-buffer", "communicator", killed_by="comm.kept_results.001")
class GatheredInOneBuffer(Wrapped):
    """Gathered parts are read from the group's own storage, which the next call writes."""

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        self._scratch = getattr(self, "_scratch", None) or Scratch()
        return self._scratch(super().all_gather(x, dim))


@fault("comm-every-64th-is-ones-own", "communicator", killed_by="comm.many_calls.001")
class Every64thIsOnesOwn(Wrapped):
    """One sum in 64 is of this rank alone."""

    def all_reduce(self, x: Tensor) -> Tensor:
        self._calls = getattr(self, "_calls", None) or Calls()
        own = x.clone()
        total = super().all_reduce(x)
        return own if self._calls.due() else total
