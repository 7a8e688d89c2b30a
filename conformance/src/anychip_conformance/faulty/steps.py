"""Faults of graphs, shapes and step programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from anychip.plugin_api import (
    CompileReport,
    EagerCall,
    EnteringRow,
    KVPlan,
    ModelSource,
    SamplingInputs,
    ShapeKey,
    ShapePolicy,
    StepInputs,
    StepLimits,
)
from anychip_conformance.fakes.hostlen import HostlenAttention, HostlenGraphs, RecordedGraph, RecordedPieces
from anychip_conformance.fakes.static import DonatedState, StaticHidden, StaticStepProgram
from anychip_conformance.faulty.registry import fault

# -- graphs ---------------------------------------------------------------------------------------------------


@fault("graph-stale-arguments", "graphs", killed_by="graph.replay.001")
class StaleArguments(HostlenGraphs):
    """A replay runs with the host arguments of its capture."""

    def run(self, handle: RecordedGraph, plans: Sequence[Any]) -> Any:
        for task in handle.tasks:
            task.replay()
        return handle.output


@fault("graph-replays-nothing", "graphs", killed_by="graph.replay.001")
class ReplaysNothing(HostlenGraphs):
    """A replay gives back what the capture computed."""

    def run(self, handle: RecordedGraph, plans: Sequence[Any]) -> Any:
        return handle.output


@fault("pieces-stale-plan", "graphs", killed_by="graph.pieces.001")
class StalePlan(HostlenGraphs):
    """Attention between replayed pieces runs under the plan of the capture."""

    def capture_pieces(
        self, fn: Any, plans: Sequence[Any], num_tokens: int, *, communicators: Any = ()
    ) -> RecordedPieces:
        self._old = plans
        return super().capture_pieces(fn, plans, num_tokens, communicators=communicators)

    def run_pieces(self, handle: RecordedPieces, plans: Sequence[Any]) -> Any:
        return super().run_pieces(handle, self._old)


@fault("pieces-lose-a-result", "graphs", killed_by="graph.pieces.001")
class LosesResult(HostlenGraphs):
    """The piece behind attention reads what attention gave at the capture."""

    def run_pieces(self, handle: RecordedPieces, plans: Sequence[Any]) -> Any:
        for piece in handle.pieces:
            if isinstance(piece, EagerCall):
                piece.call(plans, None)
            else:
                for task in piece:
                    task.replay()
        return handle.output


@fault("graph-padding-writes-block-0", "hostlen attention", killed_by="graph.replay.001")
class PaddingWritesBlock0(HostlenAttention):
    """The padded rows of a replayed step are written to the null block."""

    def plan(self, batch: Any, shape: ShapeKey, *, group: int, into: Any = None, recorder: Any = None) -> Any:
        plan = super().plan(batch, shape, group=group, into=into, recorder=recorder)
        padded = (batch.slot_mapping < 0).nonzero().flatten()
        if len(padded):
            plan.source[0] = padded[0].int()
        return plan


@fault("graph-plan-not-rewritten", "hostlen attention", killed_by="graph.replay.001")
class PlanNotRewritten(HostlenAttention):
    """`into` is left as it was: keys of later steps go where the first step's went."""

    def plan(self, batch: Any, shape: ShapeKey, *, group: int, into: Any = None, recorder: Any = None) -> Any:
        if into is not None:
            into.query_lens = batch.host_query_lens.tolist() + [0] * (shape.num_reqs - len(batch.host_query_lens))
            into.seq_lens = batch.host_seq_lens.tolist() + [0] * (shape.num_reqs - len(batch.host_seq_lens))
            return into
        return super().plan(batch, shape, group=group, recorder=recorder)


@fault("shape-too-small", "shapes", killed_by="shape.policy.001")
class TooSmall(ShapePolicy):
    """Steps are put into the next smaller shape."""

    def bucket(
        self,
        *,
        num_tokens: int,
        num_reqs: int,
        num_samples: int,
        max_query_len: int,
        num_pages: int,
        features: tuple[str, ...],
    ) -> ShapeKey:
        return super().bucket(
            num_tokens=max(1, num_tokens // 4 * 4),
            num_reqs=num_reqs,
            num_samples=num_samples,
            max_query_len=max_query_len,
            num_pages=num_pages,
            features=features,
        )


@fault("shape-forgets-pages", "shapes", killed_by="shape.policy.001")
class ForgetsPages(ShapePolicy):
    """A shape holds one page a row."""

    def bucket(
        self,
        *,
        num_tokens: int,
        num_reqs: int,
        num_samples: int,
        max_query_len: int,
        num_pages: int,
        features: tuple[str, ...],
    ) -> ShapeKey:
        return super().bucket(
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            num_samples=num_samples,
            max_query_len=max_query_len,
            num_pages=1,
            features=features,
        )


# -- step programs --------------------------------------------------------------------------------------------


@fault("step-zeros-before-copies", "step", killed_by="step.edit.001")
class ZerosBeforeCopies(StaticStepProgram):
    """Blocks are zeroed before they are copied from."""

    def edit(self, state: DonatedState, copies: Sequence[tuple[int, int]], zeros: Sequence[int]) -> DonatedState:
        return super().edit(super().edit(state, [], zeros), copies, [])


@fault("step-copies-at-once", "step", killed_by="step.edit.001")
class CopiesAtOnce(StaticStepProgram):
    """All copies read what was there before the first of them."""

    @torch.inference_mode()
    def edit(self, state: DonatedState, copies: Sequence[tuple[int, int]], zeros: Sequence[int]) -> DonatedState:
        held = state.take()
        for layer, backend in enumerate(self.model.attention):
            cache = held.caches[layer].clone()
            if copies:
                cache = backend.copy_blocks(cache, [source for source, _ in copies], [place for _, place in copies])
            held.caches[layer] = backend.zero_blocks(cache, zeros) if zeros else cache
        return DonatedState(held)


@fault("step-last-ids-by-row", "step", killed_by="step.promised_ids.001")
class LastIdsByRow(StaticStepProgram):
    """A sampled token is kept by its row in the step instead of by its slot."""

    def sample(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs) -> Any:
        rows = torch.arange(len(hidden.slots), dtype=hidden.slots.dtype)
        return super().sample(state, replace(hidden, slots=rows), late)


@fault("step-last-ids-late", "step", killed_by="step.promised_ids.001")
class LastIdsLate(StaticStepProgram):
    """A step begins with the ids of the step before the last."""

    _older: torch.Tensor | None = None

    def forward(self, state: DonatedState, inputs: StepInputs) -> Any:
        held = state.take()
        older, self._older = self._older, held.last_ids
        state, hidden = super().forward(
            DonatedState(replace(held, last_ids=held.last_ids if older is None else older)), inputs
        )
        return DonatedState(replace(state.take(), last_ids=held.last_ids)), hidden


@fault("step-compiles-while-serving", "step", killed_by="step.no_compilation.001")
class CompilesWhileServing(StaticStepProgram):
    """One shape is compiled at the start, the others when a step needs them."""

    def warm_up(self, keys: Sequence[ShapeKey]) -> CompileReport:
        return super().warm_up(keys[:1])

    def forward(self, state: DonatedState, inputs: StepInputs) -> Any:
        if inputs.key not in self._steps:
            super().warm_up([inputs.key])
        return super().forward(state, inputs)


@fault("step-scores-the-token-itself", "step", killed_by="step.scores.001")
class ScoresTheTokenItself(StaticStepProgram):
    """A prompt token is scored after itself, not after those before it."""

    def forward(self, state: DonatedState, inputs: StepInputs) -> Any:
        if inputs.score_targets is not None:
            targets = inputs.score_targets
            targets[targets >= 0] = inputs.input_ids[targets >= 0]
        return super().forward(state, inputs)


@fault("step-edits-of-the-first-row", "step", killed_by="step.edits.001")
class EditsOfTheFirstRow(StaticStepProgram):
    """The first row's biases change every row."""

    def sample(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs) -> Any:
        late.num_biases[:] = late.num_biases[0]
        held = state.take()
        slot = int(hidden.slots[0])
        edits = replace(
            held.edits,
            bias_ids=held.edits.bias_ids[slot].expand_as(held.edits.bias_ids),
            biases=held.edits.biases[slot].expand_as(held.edits.biases),
        )
        state, results = super().sample(DonatedState(replace(held, edits=edits)), hidden, late)
        after = state.take()
        kept = replace(held.edits, counts=after.edits.counts)
        return DonatedState(replace(after, edits=kept)), results


@fault("step-biases-stay", "step", killed_by="step.edits.001")
class BiasesStay(StaticStepProgram):
    """A slot keeps the biases of the first request that had any."""

    def enter(self, state: DonatedState, rows: Sequence[EnteringRow]) -> DonatedState:
        self._owned = getattr(self, "_owned", set())
        none = {"bias_ids": np.zeros(0, np.int32), "biases": np.zeros(0, np.float32)}
        state = super().enter(state, [replace(row, **none) if row.slot in self._owned else row for row in rows])
        self._owned |= {row.slot for row in rows}
        return state


def with_counts(state: DonatedState, counts: torch.Tensor) -> DonatedState:
    held = state.take()
    return DonatedState(replace(held, edits=replace(held.edits, counts=counts)))


def counts_of(state: DonatedState) -> torch.Tensor:
    assert state._held is not None
    return state._held.edits.counts


@fault("step-counts-stay", "step", killed_by="step.penalties_anew.001")
class CountsStay(StaticStepProgram):
    """A slot's next owner begins with what the last one left."""

    def enter(self, state: DonatedState, rows: Sequence[EnteringRow]) -> DonatedState:
        before = counts_of(state).clone()
        state = super().enter(state, rows)
        return with_counts(state, torch.maximum(before, counts_of(state)))


@fault("step-counts-the-prompt-as-output", "step", killed_by="step.penalties.001")
class CountsThePromptAsOutput(StaticStepProgram):
    """Tokens of the prompt count as drawn."""

    def enter(self, state: DonatedState, rows: Sequence[EnteringRow]) -> DonatedState:
        return super().enter(state, [replace(row, counts=row.counts + row.counts % 2) for row in rows])


@fault("step-counts-twice-what-comes-back", "step", killed_by="step.penalties_anew.001")
class CountsTwiceWhatComesBack(StaticStepProgram):
    """The output of a request that enters anew counts twice."""

    def enter(self, state: DonatedState, rows: Sequence[EnteringRow]) -> DonatedState:
        return super().enter(state, [replace(row, counts=row.counts % 2 + row.counts // 2 * 4) for row in rows])


@fault("step-counts-late", "step", killed_by="step.penalties.001")
class CountsLate(StaticStepProgram):
    """The token just drawn counts a step later."""

    _waiting: torch.Tensor | None = None

    def sample(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs) -> Any:
        before = counts_of(state).clone()
        state, results = super().sample(state, hidden, late)
        drawn, waiting = counts_of(state) - before, self._waiting
        self._waiting = drawn
        return with_counts(state, before if waiting is None else before + waiting), results


@fault("step-counts-by-row", "step", killed_by="step.penalties.001")
class CountsByRow(StaticStepProgram):
    """A drawn token counts for the row's place in the step instead of for its slot."""

    def sample(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs) -> Any:
        before = counts_of(state).clone()
        state, results = super().sample(state, hidden, late)
        drawn = counts_of(state) - before
        moved = torch.zeros_like(drawn)
        moved[: late.num_samples] = drawn[hidden.slots[: late.num_samples].long()]
        return with_counts(state, before + moved), results


@fault("step-padding-counts", "step", killed_by="step.penalties.001")
class PaddingCounts(StaticStepProgram):
    """What padded rows draw counts for the first slot."""

    def sample(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs) -> Any:
        before = counts_of(state)[-1].clone()
        state, results = super().sample(state, hidden, late)
        counts = counts_of(state).clone()
        counts[0] += counts[-1] - before
        return with_counts(state, counts), results


@fault("step-masks-logprobs", "step", killed_by="step.masks.001")
class MasksLogprobs(StaticStepProgram):
    """Log-probabilities are of the logits after the mask."""

    def sample(self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs) -> Any:
        if late.masks is not None:
            masks = torch.from_numpy(late.masks.copy())
            masked = self.ops.apply_token_masks(logits=hidden.logits.float(), masks=masks[: len(hidden.logits)])
            hidden = replace(hidden, logits=masked)
        return super().sample(state, hidden, late)


@fault("step-attention-scale", "step", killed_by="e2e.greedy.001")
class AttentionScale(StaticStepProgram):
    """The program's second layer multiplies queries and keys by three times the model's scale."""

    def __init__(self, source: ModelSource, kv: KVPlan, limits: StepLimits) -> None:
        super().__init__(source, kv, limits)
        model: Any = self.model
        for layer in model.layers[1:2]:
            layer.attention.layer.scale *= 3
