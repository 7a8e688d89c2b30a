"""Faults that a bad row or one without tokens brings out, in attention of three forms, states, groups and steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anychip.ops.reference import ReferenceEncoder, ReferenceLatent
from anychip.plugin_api import AttentionLayer, BatchView, EncoderLayer, EncoderView, LatentLayer, StateLayer, StateView
from anychip_conformance.fakes.static import DonatedState, StaticHidden, StaticStepProgram
from anychip_conformance.faulty.bad_rows import bad, shadow
from anychip_conformance.faulty.plain import PlainAttention
from anychip_conformance.faulty.ranks import Wrapped
from anychip_conformance.faulty.recurrences import PlainRecurrence
from anychip_conformance.faulty.registry import fault
from anychip_conformance.faulty.states import PlainStates, States


@fault("attention-writes-by-a-product", "attention", killed_by="attn.bad_rows.001")
class WritesByAProduct(PlainAttention):
    """New keys and values come to their slots by a product with zeros and ones: a NaN comes to every slot written."""

    def write_kv(self, k: Tensor, v: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer) -> Tensor:
        return super().write_kv(k + shadow(k).to(k.dtype), v + shadow(v).to(v.dtype), cache, plan, layer)


@fault("attention-queries-in-tiles", "attention", killed_by="attn.bad_rows.001")
class QueriesInTiles(PlainAttention):
    """Queries of several rows share a tile, whose other rows are multiplied by zero."""

    def attend(
        self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> Tensor:
        tokens = int(plan.query_start[-1])
        result = super().attend(q, cache, plan, layer, out=out)
        result[:tokens] += shadow(q[:tokens]).to(q.dtype)
        return result


@fault("attention-bad-row-ends-the-step", "attention", killed_by="attn.bad_rows.001")
class BadRowEndsTheStep(PlainAttention):
    """Rows behind one that is no number are left at zero."""

    def attend(
        self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> Tensor:
        result = super().attend(q, cache, plan, layer, out=out)
        lost = bad(result).nonzero()
        if len(lost):
            result[int(lost[0]) + 1 :] = 0
        return result


@fault("attention-empty-row-zeroes-the-next", "attention", killed_by="attn.empty_rows.001")
class EmptyRowZeroesTheNext(PlainAttention):
    """A row without a query writes its zeros at the place where the next row begins."""

    def attend(
        self, q: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> Tensor:
        result = super().attend(q, cache, plan, layer, out=out)
        for row in range(len(plan.host_query_lens)):
            begin, end = self.query_range(plan, row)
            if begin == end and begin < int(plan.query_start[-1]):
                result[begin] = 0
        return result


@fault("attention-empty-rows-come-last", "attention", killed_by="attn.empty_rows.001")
class EmptyRowsComeLast(PlainAttention):
    """A step of single tokens takes row r's query for token r, wherever rows without one stand."""

    def query_range(self, plan: BatchView, row: int) -> tuple[int, int]:
        honest = super().query_range(plan, row)
        if int(plan.host_query_lens.max()) > 1 or honest[0] == honest[1]:
            return honest
        at = min(row, int(plan.query_start[-1]) - 1)
        return at, at + 1


@fault("latent-bad-row-for-all", "latent", killed_by="latent.bad_rows.001")
class LatentBadRowForAll(ReferenceLatent):
    """Rows of a step are written by a product with zeros and ones."""

    def write_rows(self, latent: Tensor, k_rope: Tensor, cache: Tensor, plan: BatchView, layer: LatentLayer) -> Tensor:
        return super().write_rows(latent + shadow(latent).to(latent.dtype), k_rope, cache, plan, layer)


@fault("latent-empty-row-takes-the-next", "latent", killed_by="latent.empty_rows.001")
class LatentEmptyRowTakesTheNext(ReferenceLatent):
    """A row without a query attends for the token behind its place."""

    def attend(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        plan: BatchView,
        layer: LatentLayer,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        result = super().attend(q_nope, q_rope, cache, plan, layer, out=out)
        starts = plan.query_start.tolist()
        for row in range(len(plan.host_query_lens)):
            if starts[row] == starts[row + 1] and starts[row] < starts[-1]:
                result[starts[row]] = 0
        return result


@fault("state-scan-through-a-product", "state", killed_by="state.bad_rows.001")
class ScanThroughAProduct(PlainStates):
    """What the rows before have summed is multiplied by zero where a row begins."""

    def forward(
        self, inputs: Mapping[str, Tensor], cache: States, plan: StateView, layer: StateLayer
    ) -> tuple[Tensor, States]:
        result, cache = super().forward(inputs, cache, plan, layer)
        passed = (inputs["x"].float() * 0).cumsum(dim=0).to(result.dtype)
        return result + passed, cache


@fault("state-empty-row-cleared", "state", killed_by="state.empty_rows.001")
class EmptyRowCleared(PlainStates):
    """The state of a row without a token is set to zero."""

    def forward(
        self, inputs: Mapping[str, Tensor], cache: States, plan: StateView, layer: StateLayer
    ) -> tuple[Tensor, States]:
        result, cache = super().forward(inputs, cache, plan, layer)
        for row in range(len(plan.host_query_lens)):
            begin, end = self.tokens(plan, row)
            if begin == end:
                cache["sum"][self.block(plan, row)] = 0
        return result, cache


@fault("recurrence-bad-row-for-all", "recurrence", killed_by="state.bad_rows.005")
class RecurrenceBadRowForAll(PlainRecurrence):
    """Inputs of all rows are brought to one scale."""

    def forward(
        self, inputs: Mapping[str, Tensor], cache: States, plan: StateView, layer: StateLayer
    ) -> tuple[Tensor, States]:
        spoiled = {name: given + shadow(given).to(given.dtype) for name, given in inputs.items()}
        return super().forward(spoiled, cache, plan, layer)


@fault("encoder-masked-by-a-product", "encoder", killed_by="encoder.bad_rows.001")
class EncoderMaskedByAProduct(ReferenceEncoder):
    """All texts are one square, in which the others' values are multiplied by zero."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        tokens = int(plan.host_query_lens.sum())
        return super().attend(q, k, v, plan, layer) + shadow(v[:tokens]).to(v.dtype)


@fault("encoder-bad-text-ends-the-step", "encoder", killed_by="encoder.bad_rows.001")
class BadTextEndsTheStep(ReferenceEncoder):
    """Texts behind one that is no number are not computed."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        ends = np.cumsum(plan.host_query_lens)
        starts = ends - plan.host_query_lens
        whole = [not bool(bad(q[start:end]).any()) for start, end in zip(starts, ends, strict=True)]
        count = whole.index(False) if False in whole else len(whole)
        return super().attend(q, k, v, dataclasses.replace(plan, host_query_lens=plan.host_query_lens[:count]), layer)


@fault("comm-nan-is-zero", "communicator", killed_by="comm.bad_values.001")
class NanIsZero(Wrapped):
    """What is no number is dropped from a sum."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return super().all_reduce(torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0))


@fault("comm-nan-for-all", "communicator", killed_by="comm.bad_values.001")
class NanForAll(Wrapped):
    """A message's values are brought to one scale on their way."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return super().all_reduce(x + shadow(x).to(x.dtype))


@fault("step-nan-row-for-all", "step", killed_by="step.bad_row.001")
class NanRowForAll(StaticStepProgram):
    """Logits of all rows are shifted by the batch's."""

    def sample(self, state: DonatedState, hidden: StaticHidden, late: Any) -> Any:
        samples = hidden.logits[: late.num_samples]
        shifted = hidden.logits + shadow(samples).to(samples.dtype)
        return super().sample(state, dataclasses.replace(hidden, logits=shifted), late)


@fault("step-nan-draws-no-id", "step", killed_by="step.bad_row.001")
class NanDrawsNoId(StaticStepProgram):
    """A row of NaN draws the id behind the last."""

    def sample(self, state: DonatedState, hidden: StaticHidden, late: Any) -> Any:
        state, drawn = super().sample(state, hidden, late)
        lost = bad(hidden.logits[: late.num_samples]).numpy()
        drawn.host.token_ids[:] = np.where(lost, self.vocab_size, drawn.host.token_ids)
        return state, drawn
