"""What ragged_paged_attention must compute, in plain numpy and float64: its judge."""

from __future__ import annotations

import numpy as np

from anychip_tpu.pallas.attention_spec import AttentionSpec


def reference_attention(
    spec: AttentionSpec,
    q: np.ndarray,
    k: np.ndarray | None,
    v: np.ndarray | None,
    pages: np.ndarray,
    tables: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    slots: np.ndarray | None,
    sinks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Arguments and results as ragged_paged_attention's; computes in float64, row by row and token by token."""
    pages = pages.copy()
    if spec.writes:
        for token, slot in enumerate(slots):
            if slot >= 0:
                key, value = split(spec, pages[slot // spec.page_size][:, :, slot % spec.page_size])
                key[...], value[...] = k[token], v[token]
    out = np.zeros(q.shape)
    for row, length in enumerate(lengths):
        held = pages[tables[row]].swapaxes(0, 2).swapaxes(0, 1)  # [kv_heads, parts, pages, size, lanes]
        keys, values = split(spec, held.reshape(*held.shape[:2], -1, spec.lanes))
        for token in range(starts[row], starts[row + 1]):
            position = length - starts[row + 1] + token
            first = 0 if spec.window is None else max(0, position - spec.window + 1)
            out[token] = _attend(spec, q[token], keys[:, first : position + 1], values[:, first : position + 1], sinks)
    return out, pages


def split(spec: AttentionSpec, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Views of keys and values, [num_kv_heads, ..., head_dim], of [num_kv_heads, parts, ..., lanes]."""
    lane = spec.value_lane
    return held[:, 0, ..., : spec.head_dim], held[:, -1, ..., lane : lane + spec.head_dim]


def _attend(
    spec: AttentionSpec, q: np.ndarray, keys: np.ndarray, values: np.ndarray, sinks: np.ndarray | None
) -> np.ndarray:
    """One token: q [num_heads, head_dim], keys and values [num_kv_heads, keys, head_dim]."""
    grouped = q.reshape(spec.num_kv_heads, spec.share, spec.head_dim).astype(np.float64)
    scores = np.einsum("hsd,hkd->hsk", grouped, keys.astype(np.float64)) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * np.tanh(scores / spec.softcap)
    if sinks is not None:
        sink = sinks.astype(np.float64).reshape(spec.num_kv_heads, spec.share, 1)
        scores = np.concatenate([scores, sink], axis=-1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    weights = weights[..., : keys.shape[1]]
    return np.einsum("hsk,hkd->hsd", weights, values.astype(np.float64)).reshape(q.shape)
