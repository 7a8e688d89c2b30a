"""Row calls of what keeps something of a row: attention in its three forms, and state layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from anychip.plugin_api import EncoderLayer
from anychip.types import cdiv
from anychip_conformance.cases.test_encoder import EncoderCase, encoder_view
from anychip_conformance.device import Device
from anychip_conformance.latent_calls import LatentCall, LatentCase
from anychip_conformance.paged import AttentionCase, Call
from anychip_conformance.recurrence_calls import RecurrenceCall, RecurrenceCase
from anychip_conformance.row_calls import Given, RowCall


def spans(starts: Sequence[int], counts: Sequence[int]) -> list[slice]:
    return [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]


def paged_call(device: Device, case: AttentionCase) -> RowCall:
    """Inputs are the new tokens' q, k and v; a row keeps the blocks of its table."""
    call = Call.make(device, case)
    assert call.k is not None and call.v is not None

    def run(g: Given) -> dict[str, Tensor]:
        call.q, call.k, call.v = g["q"], g["k"], g["v"]
        if case.lse:
            partial = call.run_with_lse()
            return {"output": partial.out, "log-sum-exp": partial.lse}
        return {"output": call.run()}

    def held(row: int) -> Tensor:
        # What lies behind the row's last token is nobody's.
        batch, size = call.batch, call.block_size
        length = batch.contexts[row] + batch.queries[row]
        blocks = call.backend.export_blocks(call.cache, batch.tables[row][: cdiv(length, size)])
        return blocks.movedim(2, 1).flatten(0, 1)[:length].contiguous()

    inputs = {"q": call.q, "k": call.k, "v": call.v}
    return RowCall(inputs, run, spans(call.batch.starts, call.batch.queries), held)


def latent_call(device: Device, case: LatentCase) -> RowCall:
    call = LatentCall.make(device, case)

    def run(g: Given) -> dict[str, Tensor]:
        call.inputs = dict(g)
        return {"output": call.run()}

    def held(row: int) -> Tensor:
        batch, size = call.batch, call.block_size
        length = batch.contexts[row] + batch.queries[row]
        blocks = call.held()[batch.tables[row][: cdiv(length, size)]]
        return blocks.flatten(0, 1)[:length].contiguous()

    return RowCall(call.inputs, run, spans(call.batch.starts, call.batch.queries), held)


def state_call(device: Device, case: RecurrenceCase) -> RowCall:
    call = RecurrenceCall.make(device, case)
    first = call.held()

    def run(g: Given) -> dict[str, Tensor]:
        # Every run goes on from the same states.
        call.put(list(range(call.num_blocks)), first)
        call.inputs = dict(g)
        return {"output": call.run()}

    counts = [row.query for row in case.rows]
    starts = np.concatenate(([0], np.cumsum(counts)))[:-1].tolist()
    return RowCall(call.inputs, run, spans(starts, counts), lambda row: call.held()[call.blocks[row]].contiguous())


def encoder_call(device: Device, case: EncoderCase) -> RowCall:
    device.need_dtype(case.dtype)
    device.need("encoders", device.capabilities.encoders, lambda: device.platform.encoder(case.spec))
    backend, rng = device.platform.encoder(case.spec), np.random.default_rng(case.seed)
    view, key = encoder_view(device, case)
    heads = {"q": case.num_heads, "k": case.num_kv_heads, "v": case.num_kv_heads}
    inputs = {
        name: device.tensor(rng.normal(size=(key.num_tokens, count, case.head_dim)), case.dtype)
        for name, count in heads.items()
    }
    table = rng.normal(size=(case.num_heads, 2 * case.reach + 1))
    bias = device.tensor(table, "float32") if case.reach else None
    layer = EncoderLayer(index=0, scale=case.head_dim**-0.5, ops=device.ops.ops, bias=bias)
    plan = backend.plan(view, key, group=0)

    def run(g: Given) -> dict[str, Tensor]:
        return {"output": backend.forward(g["q"], g["k"], g["v"], plan, layer)}

    starts = torch.tensor([0, *case.lengths]).cumsum(0)[:-1].tolist()
    return RowCall(inputs, run, spans(starts, case.lengths))
