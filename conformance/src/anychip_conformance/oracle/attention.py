"""The oracle of attention: one row's queries over its keys in float64, and how far an honest backend may be off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anychip_conformance.oracle.rounding import U32, UNIT_ROUNDOFF, gamma, rounded
from anychip_conformance.oracle.vectorised import Array, Bounded


@dataclass(frozen=True, slots=True)
class AttendedRow:
    """`out` [queries, heads, dim]; `lse` [queries, heads], of scores and sinks."""

    out: Bounded
    lse: Bounded


def attention_row(
    q: Array,  # [queries, heads, dim]
    k: Array,  # [keys, kv_heads, dim]
    v: Array,
    *,
    scale: float,
    dtype: str,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Array | None = None,
    sinks: Array | None = None,
    causal: bool = True,
    bias: Array | None = None,
    dq: float = 0.0,
    dkv: float = 0.0,
) -> AttendedRow:
    """The last queries of a sequence over all its keys. `dq` and `dkv` are relative roundings of q, and of k and v,
    beyond what is given: a kernel may hold them in the dtype or not. Not causal, queries and keys are one sequence, and
    a window goes to both sides; `bias` [heads, queries, keys] is added to scores."""
    queries, keys, repeat = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = k.repeat(repeat, axis=1), v.repeat(repeat, axis=1)
    raw = np.einsum("qhd,khd->hqk", q, k) * scale
    error = np.einsum("qhd,khd->hqk", np.abs(q), np.abs(k)) * abs(scale) * (gamma(q.shape[-1] + 3) + dq + dkv)
    scores = raw
    if softcap is not None:
        scores = softcap * np.tanh(raw / softcap)
        error = error + 8 * U32 * np.abs(scores)
    query = np.arange(keys - queries, keys)[:, None]
    key = np.arange(keys)[None, :]
    if slopes is not None:
        scores = scores + slopes[:, None, None] * (key - query)
        error = error + 4 * U32 * np.abs(slopes)[:, None, None] * keys
    if bias is not None:
        scores = scores + bias
        error = error + 2 * U32 * (np.abs(bias) + np.abs(scores))
    visible = key <= query if causal else np.ones_like(key <= query)
    if window is not None:
        visible &= key > query - window if causal else np.abs(key - query) <= window
    scores = np.where(visible, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None, None])
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - top)
    weights = weights / total
    out = np.einsum("hqk,khd->qhd", weights, v)
    size = np.einsum("hqk,khd->qhd", weights, np.abs(v))
    # A score's error multiplies its weight, and through the sum all others; the exponent's argument rounds as well.
    spread = np.where(visible, np.abs(np.where(visible, scores, 0.0) - top), 0.0)
    worst = np.where(visible, error + 4 * U32 * (spread + np.abs(np.where(visible, scores, 0.0))), 0.0).max(-1)
    relative = np.expm1(2 * worst) + gamma(keys + 8) + UNIT_ROUNDOFF[dtype] + dkv
    lse = (top + np.log(total))[..., 0]
    # It moves by no more than the scores do; the sum's relative error is absolute in its logarithm.
    moved = worst + gamma(keys + 8) + 8 * U32 * (np.abs(top[..., 0]) + np.abs(lse))
    return AttendedRow(Bounded(out, size * relative.T[:, :, None] + rounded(out, dtype)), Bounded(lse.T, moved.T))
