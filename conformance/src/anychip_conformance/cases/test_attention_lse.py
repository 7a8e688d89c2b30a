"""The log-sum-exp of attention, and parts of a sequence that it merges to the whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st

from anychip.ops.reference import merge_attention
from anychip.plugin_api import NULL_BLOCK, PADDING_SLOT, PartialAttention
from anychip_conformance.attention_cases import DECODE, RAGGED, drawn, rows
from anychip_conformance.case import kind
from anychip_conformance.choices import each_dtype
from anychip_conformance.device import Device, seen
from anychip_conformance.oracle.vectorised import Bounded
from anychip_conformance.paged import AttentionCase, Call
from anychip_conformance.paged_judge import check_attention, judge_output


@kind(
    "attn.lse",
    corpus=[
        *each_dtype(
            AttentionCase(rows=RAGGED, lse=True, pad_tokens=3, pad_rows=2),
            AttentionCase(rows=DECODE, lse=True, num_heads=8, num_kv_heads=2, pad_rows=2, pad_tokens=2),
            AttentionCase(rows=RAGGED, lse=True, scale=0.5, softcap=2.0, magnitude=4.0),
            AttentionCase(rows=RAGGED, lse=True, alibi=True),
            AttentionCase(rows=DECODE, lse=True, alibi=True, sinks=True, num_heads=6, num_kv_heads=2),
            AttentionCase(rows=RAGGED, lse=True, window=4),
            AttentionCase(rows=DECODE, lse=True, window=17, softcap=30.0, sinks=True),
            AttentionCase(rows=RAGGED, lse=True, sinks=True, strided=True, guarded=True),
            AttentionCase(rows=RAGGED, lse=True, rope="neox", qk_norm=True),
        ),
        AttentionCase(rows=RAGGED, lse=True, magnitude=400.0),
        AttentionCase(rows=DECODE, lse=True, magnitude=2000.0),
        AttentionCase(rows=rows((0, 1500, 1), (0, 700, 2)), lse=True, magnitude=0.1, head_dim=32),
        AttentionCase(rows=RAGGED, lse=True, kv="int8"),
        AttentionCase(rows=DECODE, lse=True, kv="fp8", read_only=True),
    ],
    drawn=drawn(
        lse=True,
        window=st.sampled_from([None, 9]),
        softcap=st.sampled_from([None, 5.0]),
        alibi=st.booleans(),
        sinks=st.booleans(),
    ),
)
def log_sum_exp(device: Device, case: AttentionCase) -> None:
    """The natural logarithm of the sum of e^score, by query and head, of scores as the softmax sees them: scaled,
    capped, biased, within the window, with the sink. Large scores do not overflow, padded rows have -inf, and the
    output is what it is without."""
    check_attention(device, case)


@kind(
    "attn.lse_merge",
    corpus=each_dtype(
        AttentionCase(rows=DECODE, lse=True),
        AttentionCase(rows=rows((4, 0, 1), (2, 5, 1), (0, 3, 1)), lse=True, num_heads=8, num_kv_heads=2, pad_rows=2),
        AttentionCase(rows=DECODE, lse=True, softcap=2.0, magnitude=4.0),
        AttentionCase(rows=DECODE, lse=True, sinks=True, num_heads=6, num_kv_heads=3),
        AttentionCase(rows=DECODE, lse=True, rope="neox", magnitude=20.0),
    ),
)
def merged_parts(device: Device, case: AttentionCase) -> None:
    """Attention over a sequence's first blocks, merged with attention over the rest, is attention over all. A part
    without keys weighs nothing but its sinks. What a query sees hangs on lengths, also where positions are the whole
    sequence's."""
    whole = Call.make(device, case)
    result = whole.run_with_lse()
    judge_output(device, whole, result.out, result.lse)
    pages = [len(table) // 2 for table in whole.batch.tables]
    first, rest = _part(device, whole, pages, first=True), _part(device, whole, pages, first=False)
    for row, (count, start) in enumerate(zip(pages, whole.batch.starts, strict=True)):
        if count == 0:
            nothing = np.zeros((case.num_heads, case.head_dim))
            device.compare(f"output of row {row} without keys", first.out[start], Bounded(nothing, nothing))
            lse = np.full(case.num_heads, -np.inf) if whole.layer.sinks is None else seen(whole.layer.sinks)
            device.compare(f"log-sum-exp of row {row} without keys", first.lse[start], Bounded(lse, 1e-6 * np.abs(lse)))
    merged = merge_attention(first, rest)
    judge_output(device, whole, merged.out, merged.lse, num_parts=2)


def _part(device: Device, whole: Call, pages: list[int], *, first: bool) -> PartialAttention:
    """Of rows with one query each: its first pages, with the sinks where there are any, or those behind them."""
    batch, size = whole.batch, whole.block_size
    view = batch.view
    table, lengths = seen(view.block_table).astype(np.int64), seen(view.seq_lens).astype(np.int64)
    for row, count in enumerate(pages):
        if first:
            table[row, count:] = NULL_BLOCK
            lengths[row] = count * size
        else:
            table[row] = np.append(table[row, count:], np.full(count, NULL_BLOCK))
            lengths[row] -= count * size
    view = replace(
        view,
        seq_lens=device.tensor(lengths, "int32"),
        block_table=device.tensor(table, "int32"),
        slot_mapping=torch.full_like(view.slot_mapping, PADDING_SLOT),
        host_seq_lens=None if view.host_seq_lens is None else lengths[: len(pages)].astype(np.int32),
    )
    if view.host_slot_mapping is not None:
        view.host_slot_mapping = np.full_like(view.host_slot_mapping, PADDING_SLOT)
    layer = whole.layer
    if layer.sinks is not None and not first:
        layer = replace(layer, sinks=torch.full_like(layer.sinks, -torch.inf))
    return replace(whole, batch=replace(batch, view=view), layer=layer, k=None, v=None).run_with_lse()
