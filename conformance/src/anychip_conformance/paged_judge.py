"""Judges one attention call in full: the output within its bound, padding, guards, inputs, every byte of the cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from anychip.types import cdiv
from anychip_conformance.device import Device, bits, seen, unchanged
from anychip_conformance.oracle.attention import attention_row
from anychip_conformance.oracle.rounding import FP8_SMALLEST_STEP, FP8_UNIT, U32, UNIT_ROUNDOFF, gamma
from anychip_conformance.oracle.vectorised import Bounded, rms_norm, rotary
from anychip_conformance.paged import BYTE_MAX, GUARD, AttentionCase, Call

_JUDGED_QUERIES = 256
"""Of one row at a time: what they and their keys take in float64 stays small."""


def check_attention(device: Device, case: AttentionCase) -> None:
    """Makes the call and judges all of it."""
    call = Call.make(device, case)
    before = call.blocks().clone()
    in_place = device.capabilities.kv_write != "functional" and not case.far
    raw_before = bits(call.raw).copy() if in_place else None
    inputs = {"q": call.q, "block_table": call.batch.view.block_table, "slot_mapping": call.batch.view.slot_mapping}
    inputs |= {name: t for name, t in (("k", call.k), ("v", call.v)) if t is not None}
    inputs |= {"seq_lens": call.batch.view.seq_lens, "positions": call.batch.view.positions}
    same = unchanged(device, inputs)
    if case.lse:
        partial = call.run_with_lse()
        result, lse = partial.out, partial.lse
    else:
        result, lse = call.run(), None
    same()
    judge_cache(device, call, before, raw_before)
    judge_output(device, call, result, lse)
    if call.out is not None:
        for name, rows in (("before", call.out[:GUARD]), ("behind", call.out[-GUARD:])):
            assert bool(torch.isnan(rows).all()), f"rows {name} the output were written"


def judge_output(device: Device, call: Call, result: Tensor, lse: Tensor | None = None, *, num_parts: int = 1) -> None:
    """Rows against the oracle over what the cache holds; padded rows against zero, their log-sum-exp against -inf.
    `num_parts`: how many were merged, each with roundings of its own."""
    case, batch = call.case, call.batch
    shape = (batch.key.num_tokens, case.num_heads, case.head_dim)
    assert tuple(result.shape) == shape, f"the output has shape {tuple(result.shape)}, expected {shape}"
    assert str(result.dtype) == f"torch.{case.dtype}", f"the output is {result.dtype}"
    if lse is not None:
        assert tuple(lse.shape) == shape[:2], f"the log-sum-exp has shape {tuple(lse.shape)}, expected {shape[:2]}"
        assert str(lse.dtype) == "torch.float32", f"the log-sum-exp is {lse.dtype}"
    slack = 1 if num_parts == 1 else 2 * num_parts  # merged outputs round, and so do the weights that lse gives them
    u = UNIT_ROUNDOFF[case.dtype]
    q, dq = _rotated_queries(call)
    held = _decoded(call)  # [blocks, 2, size, kv_heads, dim] float64
    slopes = None if call.layer.alibi_slopes is None else seen(call.layer.alibi_slopes)
    sinks = None if call.layer.sinks is None else seen(call.layer.sinks)
    label = f"attention/{case.dtype}" if case.kv == "same" else f"attention {case.kv} cache/{case.dtype}"
    for row, (start, context, query) in enumerate(zip(batch.starts, batch.contexts, batch.queries, strict=True)):
        if query == 0:
            continue
        pages = cdiv(context + query, call.block_size)
        keys = held[call.places(batch.tables[row][:pages])]
        k = keys[:, 0].reshape(-1, *held.shape[-2:])[: context + query]
        v = keys[:, 1].reshape(-1, *held.shape[-2:])[: context + query]
        if case.window is not None:
            # What the first query no longer sees may be anything.
            passed = max(0, context + 1 - case.window)
            k, v = k.copy(), v.copy()
            k[:passed], v[:passed] = 0.0, 0.0
        for first in range(0, query, _JUDGED_QUERIES):
            mine = slice(start + first, start + min(first + _JUDGED_QUERIES, query))
            seen_keys = context + mine.stop - start
            expected = attention_row(
                q[mine],
                k[:seen_keys],
                v[:seen_keys],
                scale=call.layer.scale,
                dtype=case.dtype,
                window=case.window,
                softcap=case.softcap,
                slopes=slopes,
                sinks=sinks,
                dq=dq,
                dkv=0.0 if case.kv == "same" else u,
            )
            what = f"row {row}" + (f" from its token {first}" if first else "")
            device.compare(f"output of {what}", result[mine], expected.out.widened(slack), label=label)
            if lse is not None:
                label_of_lse = label.replace("attention", "attention lse", 1)
                device.compare(f"log-sum-exp of {what}", lse[mine], expected.lse.widened(slack), label=label_of_lse)
    padded = result[batch.num_tokens :]
    if len(padded) and device.capabilities.padding == "zero_rows":
        zero = np.zeros(tuple(padded.shape))
        device.compare("padded rows", padded, Bounded(zero, zero))
        if lse is not None:
            unseen = np.full((len(padded), case.num_heads), -np.inf)
            device.compare(
                "log-sum-exp of padded rows", lse[batch.num_tokens :], Bounded(unseen, np.zeros_like(unseen))
            )


def judge_cache(device: Device, call: Call, before: Tensor, raw_before: np.ndarray | None) -> None:
    """Slots of this step hold its keys and values, everything else its old bytes."""
    case, size = call.case, call.block_size
    after = call.blocks()
    written = call.batch.slots[call.batch.slots >= 0] if call.k is not None else np.empty(0, dtype=np.int64)
    blocks, offsets = torch.from_numpy(call.places(written // size)), torch.from_numpy(written % size)
    if call.k is not None and call.v is not None:
        tokens = torch.from_numpy(np.flatnonzero(call.batch.slots >= 0))
        new = after.to("cpu")[blocks, :, offsets]  # [tokens, 2, kv_heads, dim]
        keys, values = call.k.to("cpu")[tokens], call.v.to("cpu")[tokens]
        if case.kv != "same":
            _judge_quantized(device, call, "keys in the cache", new[:, 0], seen(keys), call.layer.k_scale)
            _judge_quantized(device, call, "values in the cache", new[:, 1], seen(values), call.layer.v_scale)
        else:
            device.same_bits("values in the cache", new[:, 1].contiguous(), values.contiguous())
            if call.rope is None and call.qk_norm is None:
                device.same_bits("keys in the cache", new[:, 0].contiguous(), keys.contiguous())
            else:
                expected = _rotated(call, seen(call.k)[: call.batch.num_tokens], keys=True)
                expected = Bounded(expected.value[tokens.numpy()], expected.bound[tokens.numpy()])
                device.compare("rotated keys in the cache", new[:, 0], expected, label=f"qkv_norm_rope/{case.dtype}")
    kept = after.to("cpu").clone()
    kept[blocks, :, offsets] = before.to("cpu")[blocks, :, offsets]
    device.same_bits("bytes of the cache that this step does not own", kept, before.to("cpu"))
    if raw_before is not None:
        touched = set((written // size).tolist())
        count = len(call.watched)
        old, new_bytes = raw_before.reshape(count, -1), bits(call.raw).reshape(count, -1)
        for block in range(count):
            same = np.array_equal(old[block], new_bytes[block])
            assert same or block in touched, f"raw bytes of block {block} changed"
            assert not same or block not in touched, (
                f"block {block} was written elsewhere than in the memory it was given"
            )


def _rotated_queries(call: Call) -> tuple[np.ndarray, float]:
    """Queries after norm and rotary, and their relative error in the scores."""
    q = seen(call.q)[: call.batch.num_tokens]
    if call.rope is None and call.qk_norm is None:
        return q, 0.0
    rotated = _rotated(call, q, keys=False)
    size = np.maximum(np.abs(rotated.value).max(-1, keepdims=True), 1e-30)
    return rotated.value, float((rotated.bound / size).max()) * call.case.head_dim**0.5


def _rotated(call: Call, x: np.ndarray, *, keys: bool) -> Bounded:
    """[tokens, heads, dim] after norm and rotary, with the bound of both; the norm's result may be rounded between."""
    case = call.case
    value, error = x, np.zeros_like(x)
    if call.qk_norm is not None:
        weight = seen(call.qk_norm.k_weight if keys else call.qk_norm.q_weight)
        normed = rms_norm(x, weight, call.qk_norm.eps, call.qk_norm.unit_offset, case.dtype)
        value, error = normed.value, normed.bound
    if call.rope is None:
        return Bounded(value, error)
    positions = seen(call.batch.view.positions)[: len(x)].astype(int)
    tables = (seen(call.rope.cos), seen(call.rope.sin))
    turned = rotary(value, *tables, positions, call.rope.interleaved, case.dtype)
    # A rotation adds both coordinates' errors at most.
    carried = rotary(error, *(np.abs(t) for t in tables), positions, call.rope.interleaved, case.dtype)
    swapped = error.max(-1, keepdims=True)
    return Bounded(turned.value, turned.bound + np.abs(carried.value) + swapped)


def _decoded(call: Call) -> np.ndarray:
    """What the cache stands for, float64 [blocks, 2, size, kv_heads, dim]."""
    held = call.blocks()
    if call.case.kv == "same":
        return seen(held)
    wide = seen(held.to("cpu").contiguous().view(getattr(torch, call.case.kv_dtype)).float())
    assert call.layer.k_scale is not None and call.layer.v_scale is not None
    wide[:, 0] *= seen(call.layer.k_scale).reshape(-1, 1)
    wide[:, 1] *= seen(call.layer.v_scale).reshape(-1, 1)
    return wide


def _judge_quantized(
    device: Device, call: Call, what: str, held: Tensor, plain: np.ndarray, scale: Tensor | None
) -> None:
    """Half a step of the byte's format from the value it stands for; saturated beyond its range."""
    assert scale is not None
    most = BYTE_MAX[call.case.kv_dtype]
    scaled = np.clip(plain / seen(scale).reshape(-1, 1), -most, most)
    stored = held.contiguous().view(getattr(torch, call.case.kv_dtype)).float()
    if call.case.kv == "int8":
        bound = 0.5 + np.abs(scaled) * gamma(4)
    else:
        bound = np.maximum(np.abs(scaled) * FP8_UNIT, FP8_SMALLEST_STEP / 2) + np.abs(scaled) * 4 * U32
    device.compare(what, stored, Bounded(scaled, bound), label=f"kv write {call.case.kv}/{call.case.dtype}")
