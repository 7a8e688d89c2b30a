"""Faults that are right for tidy tensors: kernels that take a view for a tensor of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import REFERENCE_OPS, DenseWeights, ExpertWeights, ReferenceEncoder, ReferenceLatent
from anychip.ops.reference.quantized import QuantizedMatrix
from anychip.plugin_api import AttentionLayer, BatchView, EncoderLayer, EncoderView, Routing, StateView
from anychip_conformance.faulty.plain import InvariantMoE, PlainAttention, PlainLinear
from anychip_conformance.faulty.products import FaultyQuantized, quantized_or_plain
from anychip_conformance.faulty.ranks import Wrapped
from anychip_conformance.faulty.recurrences import PlainRecurrence
from anychip_conformance.faulty.registry import fault
from anychip_conformance.forms import FORMS

Misread = Callable[[Tensor], Tensor]


def number_of(form: str) -> str:
    """Of the case of a form kind."""
    return f"{FORMS.index(form) + 1:03}"  # type: ignore[arg-type]


# -- how a view is misread --------------------------------------------------------------------------------------


def as_tidy(x: Tensor) -> Tensor:
    """Its first number, and as many behind it as it has."""
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * size)
    return torch.as_strided(x, x.shape, strides, x.storage_offset())


def from_the_start(x: Tensor) -> Tensor:
    """As though it began where its storage begins."""
    return torch.as_strided(x, x.shape, x.stride(), 0)


def rows_apart(x: Tensor) -> Tensor:
    """The distance of rows is honoured, and that of heads taken for their width."""
    if x.dim() < 3:
        return x
    return torch.as_strided(x, x.shape, (x.stride(0), x.shape[2], 1), x.storage_offset())


def at_even_elements(x: Tensor) -> Tensor:
    """Loads of two elements begin at even ones."""
    return torch.as_strided(x, x.shape, x.stride(), x.storage_offset() // 2 * 2)


def wider_than_long(x: Tensor) -> Tensor:
    """A distance of rows below the width, as of rows that are all one, is taken for the width: zeros lie there."""
    return torch.cat((x[:1], x[1:] * 0)) if x.dim() > 1 and x.stride(0) < x.shape[-1] else x


# -- ops --------------------------------------------------------------------------------------------------------


def misreads(op: str, *names: str, how: Misread, summary: str) -> Callable[..., Any]:
    """The reference, which misreads some of its arguments."""

    def override(**arguments: Any) -> Any:
        taken = {name: how(arguments[name]) for name in names if arguments.get(name) is not None}
        return REFERENCE_OPS[op](**{**arguments, **taken})

    override.__doc__ = summary
    return override


for _id, _op, _names, _how, _form, _summary in (
    ("norm-tidy", "rms_norm", ("x",), as_tidy, "sliced", "Rows of x are read one behind the other."),
    (
        "residual-tidy",
        "residual_norm_quant",
        ("residual",),
        as_tidy,
        "spaced",
        "Rows of the residual are read densely.",
    ),
    ("rotary-heads", "rotary", ("x",), rows_apart, "turned", "Heads are read one behind the other."),
    ("qkv-tidy", "qkv_norm_rope", ("k",), as_tidy, "sliced", "Keys are read one behind the other."),
    ("activation-tidy", "gated_activation", ("gate_up",), as_tidy, "spaced", "Rows of gate and up are read densely."),
    ("gate-up-offset", "gate_up_act_quant", ("gate_up",), from_the_start, "padded", "The offset is forgotten."),
    ("softcap-expanded", "softcap", ("x",), wider_than_long, "expanded", "A row distance of 0 is taken for another."),
    ("embedding-ids", "embedding", ("ids",), from_the_start, "offset", "Ids are read from their storage's start."),
    ("mask-words", "apply_token_masks", ("masks",), as_tidy, "sliced", "Rows of a mask are read densely."),
    ("mask-logits", "apply_token_masks", ("logits",), as_tidy, "spaced", "Rows of logits are read densely."),
    ("edit-slots", "edit_logits", ("slots",), from_the_start, "offset", "Slots are read from their storage's start."),
    ("edit-logits", "edit_logits", ("logits",), as_tidy, "sliced", "Rows of logits are read densely."),
    ("count-ids", "count_tokens", ("ids",), from_the_start, "offset", "Ids are read from their storage's start."),
    ("drafts-ids", "accept_drafts", ("draft_ids",), at_even_elements, "offset", "Drafts are read in pairs."),
    ("low-rank-x", "add_low_rank", ("x",), as_tidy, "sliced", "Rows of x are read densely."),
    ("low-rank-slots", "add_low_rank", ("slots",), from_the_start, "offset", "Slots are read from the start."),
):
    fault(f"op-form-{_id}", "op", op=_op, killed_by=f"op.form.{number_of(_form)}")(
        misreads(_op, *_names, how=_how, summary=_summary)
    )

for _id, _op, _names, _how, _form, _summary in (
    ("logits", "sample", ("logits",), as_tidy, "sliced", "Rows of logits are read densely."),
    ("logits-start", "sample", ("logits",), from_the_start, "padded", "Logits are read from their storage's start."),
    ("temperature", "sample", ("temperature",), from_the_start, "offset", "Temperatures are read from the start."),
    ("seed-pairs", "sample", ("seed_low",), at_even_elements, "offset", "Seeds are read in pairs."),
    ("likeliest", "logprobs", ("logits",), as_tidy, "spaced", "Rows of logits are read densely."),
    ("chosen", "logprobs", ("token_ids",), from_the_start, "offset", "Chosen ids are read from the start."),
):
    fault(f"sample-form-{_id}", "op", op=_op, killed_by=f"sample.form.{number_of(_form)}")(
        misreads(_op, *_names, how=_how, summary=_summary)
    )


# -- attention --------------------------------------------------------------------------------------------------


class MisreadAttention(PlainAttention):
    """Queries, keys, values or the batch are misread."""

    def rotate_and_write(self, q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any) -> tuple[Tensor, Any]:
        q, k, v = self.projected(q, k, v)
        return super().rotate_and_write(q, k, v, *rest)

    def projected(self, q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return q, k, v

    def plan(self, batch: BatchView, *rest: Any, **more: Any) -> Any:
        return super().plan(self.batch(batch), *rest, **more)

    def batch(self, batch: BatchView) -> BatchView:
        return batch


@fault("attn-form-heads", "attention", killed_by=f"attn.form.{number_of('turned')}")
class HeadsMisread(MisreadAttention):
    """Heads of a query are read one behind the other, whatever lies between them."""

    def projected(self, q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return rows_apart(q), k, v


@fault("attn-form-values-as-keys", "attention", killed_by=f"attn.form.{number_of('spaced')}")
class ValuesAsKeys(MisreadAttention):
    """Values are read as densely as they could lie."""

    def projected(self, q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return q, k, None if v is None else as_tidy(v)


@fault("attn-form-keys-of-one-row", "attention", killed_by=f"attn.form.{number_of('expanded')}")
class KeysOfOneRow(MisreadAttention):
    """Keys whose tokens have a distance of 0 are read as though they had their width."""

    def projected(self, q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if k is not None and len(k) > 1 and k.stride(0) == 0:
            k = torch.cat((k[:1], k[1:] * 0))
        return q, k, v


@fault("attn-form-table", "attention", killed_by=f"attn.form.{number_of('sliced')}")
class TableMisread(MisreadAttention):
    """Rows of the block table are read one behind the other."""

    def batch(self, batch: BatchView) -> BatchView:
        return replace(batch, block_table=as_tidy(batch.block_table).clamp(0, 3))


@fault("attn-form-slots", "attention", killed_by=f"attn.form.{number_of('offset')}")
class SlotsMisread(MisreadAttention):
    """Slots are read from the start of their storage."""

    def batch(self, batch: BatchView) -> BatchView:
        found = from_the_start(batch.slot_mapping)
        return replace(batch, slot_mapping=torch.where(found < 2**20, found, -1))


@fault("attn-form-lengths", "attention", killed_by=f"attn.form.{number_of('offset')}")
class LengthsMisread(MisreadAttention):
    """Lengths are loaded in pairs."""

    def batch(self, batch: BatchView) -> BatchView:
        found = at_even_elements(batch.seq_lens)
        return replace(batch, seq_lens=torch.where(found < 2**20, found, 1))


# -- other kernels ----------------------------------------------------------------------------------------------


@fault("linear-form-tokens", "linear", killed_by=f"linear.form.{number_of('spaced')}")
class TokensMisread(PlainLinear):
    """Tokens are read one behind the other."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        return super().apply(as_tidy(x), packed, out=out)


@fault("linear-form-one-token", "linear", killed_by=f"linear.form.{number_of('padded')}")
class OneTokenMisread(PlainLinear):
    """The path for one token reads it from the start of its storage."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        return super().apply(from_the_start(x) if len(x) == 1 else x, packed, out=out)


@fault("linear-form-out", "linear", killed_by=f"linear.form.{number_of('sliced')}")
class OutMisread(PlainLinear):
    """The result is written as densely as it could lie."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        return super().apply(x, packed, out=None if out is None else as_tidy(out))


class QuantizedTokensMisread(FaultyQuantized):
    """Tokens are read one behind the other before they are rounded."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        return super().product(as_tidy(x), matrix)


fault("linear-form-quantized", "linear", killed_by=f"linear.form_quantized.{number_of('sliced')}")(
    quantized_or_plain(QuantizedTokensMisread)
)


@fault("moe-form-tokens", "moe", killed_by=f"moe.form.{number_of('spaced')}")
class ExpertTokensMisread(InvariantMoE):
    """Tokens are read one behind the other."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        return super().experts(as_tidy(x), routing, packed, expert_map=expert_map)


@fault("moe-form-router", "moe", killed_by=f"moe.form.{number_of('sliced')}")
class RouterMisread(InvariantMoE):
    """Rows of the router's logits are read one behind the other."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        return super().route(as_tidy(router_logits).nan_to_num(0.0), bias)


@fault("latent-form-queries", "latent", killed_by=f"latent.form.{number_of('turned')}")
class LatentQueriesMisread(ReferenceLatent):
    """Heads of the queries' first part are read one behind the other."""

    def forward(self, q_nope: Tensor, *given: Any, **rest: Any) -> Any:
        return super().forward(rows_apart(q_nope), *given, **rest)


@fault("state-form-inputs", "recurrence", killed_by=f"state.form.{number_of('sliced')}")
class StateInputsMisread(PlainRecurrence):
    """Tokens of every input are read one behind the other."""

    def forward(self, inputs: Any, cache: Any, plan: StateView, layer: Any) -> Any:
        return super().forward({name: as_tidy(given) for name, given in inputs.items()}, cache, plan, layer)


@fault("encoder-form-keys", "encoder", killed_by=f"encoder.form.{number_of('spaced')}")
class EncoderKeysMisread(ReferenceEncoder):
    """Keys are read one behind the other."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        return super().attend(q, as_tidy(k), v, plan, layer)


@fault("kv-form-values", "attention", killed_by=f"kv.form.{number_of('sliced')}")
class WrittenValuesMisread(PlainAttention):
    """Values are written as they would lie without the others between them."""

    def write_kv(self, k: Tensor, v: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer) -> Tensor:
        return super().write_kv(k, as_tidy(v), cache, plan, layer)


@fault("comm-form-sum", "communicator", killed_by="comm.form.015")
class SumMisread(Wrapped):
    """What is summed is read one number behind the other."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return super().all_reduce(as_tidy(x).nan_to_num(0.0).contiguous())


@fault("comm-form-gather", "communicator", killed_by="comm.form.003")
class GatherMisread(Wrapped):
    """What is gathered is sent from the start of its storage."""

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return super().all_gather(from_the_start(x).nan_to_num(0.0).contiguous(), dim)
