"""Batches as core hands them to attention backends: ragged rows over scattered blocks, padded as the device wants."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from anychip.plugin_api import NULL_BLOCK, PADDING_SLOT, BatchView, ShapeKey, StepLimits
from anychip.types import cdiv
from anychip_conformance.device import Device

_USUAL_TOKENS, _USUAL_ROWS = 64, 16
"""What a small server would be configured with: shapes are drawn from the policy that follows."""


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One request: `blocks` whole blocks and `extra` tokens of context, then `query` new tokens. Sizes count in the
    device's blocks, so that edges are edges on every device."""

    blocks: int
    extra: int
    query: int

    def context(self, block_size: int) -> int:
        return max(0, self.blocks * block_size + self.extra)


@dataclass(slots=True)
class PagedBatch:
    """`view` is what the backend gets; the host's arrays are what the suite knows."""

    view: BatchView
    key: ShapeKey
    contexts: list[int]
    queries: list[int]
    tables: list[list[int]]  # by row, the block ids of its pages
    starts: list[int]  # by row, its first token
    slots: np.ndarray  # [num_tokens], unpadded

    @property
    def num_tokens(self) -> int:
        return sum(self.queries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    tokens: int = 0
    rows: int = 0


def paged_batch(
    device: Device,
    rows: list[Row],
    *,
    block_size: int,
    tables: list[list[int]],
    padding: Padding,
    window: int | None = None,
    shared_slots: bool = False,
    least_pages: int = 1,
) -> PagedBatch:
    """`tables` has a row's blocks for context and query. Blocks that a window has left behind become the null block.
    `shared_slots` False writes every token; True none (another layer holds the keys)."""
    caps = device.capabilities
    contexts, queries = [row.context(block_size) for row in rows], [row.query for row in rows]
    num_tokens, num_rows = sum(queries), len(rows)
    needed_pages = max((cdiv(c + q, block_size) for c, q in zip(contexts, queries, strict=True)), default=1)
    needed_pages = max(needed_pages, least_pages)
    key = _key(device, num_tokens, num_rows, max(queries), needed_pages, padding, block_size)
    positions = np.zeros(key.num_tokens, dtype=np.int32)
    slots = np.full(key.num_tokens, PADDING_SLOT, dtype=np.int64)
    table = np.full((key.num_reqs, key.num_pages), NULL_BLOCK, dtype=np.int64)
    starts = np.zeros(key.num_reqs + 1, dtype=np.int32)
    lengths = np.zeros(key.num_reqs, dtype=np.int32)
    at = 0
    for index, (context, query) in enumerate(zip(contexts, queries, strict=True)):
        place = np.arange(context, context + query)
        positions[at : at + query] = place
        ids = np.asarray(tables[index], dtype=np.int64)
        if not shared_slots:
            slots[at : at + query] = ids[place // block_size] * block_size + place % block_size
        pages = cdiv(context + query, block_size) if query else 0
        table[index, :pages] = ids[:pages]
        if window is not None and query:
            table[index, : max(0, context + 1 - window) // block_size] = NULL_BLOCK
        lengths[index] = context + query if query else 0
        starts[index] = at
        at += query
    starts[num_rows:] = num_tokens
    if caps.padding == "dummy_request":
        starts[num_rows:] = np.minimum(num_tokens + np.arange(len(starts) - num_rows), key.num_tokens)
        lengths[num_rows:] = np.diff(starts[num_rows:])
    exact = caps.host_lengths == "exact"
    view = BatchView(
        query_start=device.tensor(starts, "int32"),
        seq_lens=device.tensor(lengths, "int32"),
        block_table=device.tensor(table, "int32"),
        slot_mapping=device.tensor(slots, caps.slot_dtype),
        positions=device.tensor(positions, "int32"),
        num_reqs=key.num_reqs,
        num_tokens=key.num_tokens,
        max_query_len=max(queries),
        block_size=block_size,
        host_query_lens=np.asarray(queries, dtype=np.int32),
        host_seq_lens=lengths[:num_rows].copy() if caps.host_lengths != "none" else None,
        host_exact=exact,
        host_slot_mapping=slots[:num_tokens].astype(caps.slot_dtype) if exact else None,
    )
    return PagedBatch(
        view=view,
        key=key,
        contexts=contexts,
        queries=queries,
        tables=tables,
        starts=starts[:num_rows].tolist(),
        slots=slots[:num_tokens],
    )


def usual_limits(device: Device, tokens: int = 0, rows: int = 0, *, pages: int = 8, block_size: int = 16) -> StepLimits:
    """Of a small server, or as large as a batch needs, within the device's rules."""
    rules = device.platform.step_rules
    rows = rules.max_rows or max(rows, _USUAL_ROWS)
    bounds = (rules.max_tokens or max(tokens, _USUAL_TOKENS), rules.max_padded_tokens, rows * pages * block_size)
    return StepLimits(
        max_num_tokens=min(bound for bound in bounds if bound is not None),
        max_num_reqs=rows,
        max_model_len=pages * block_size,
        max_slots=rows,
        max_pages=(pages,),
    )


def _key(
    device: Device, tokens: int, rows: int, longest: int, pages: int, padding: Padding, block_size: int
) -> ShapeKey:
    """The device's own shape for a batch, and at least the padding that the case asks for."""
    rules = device.platform.step_rules
    for name, most, wanted in (
        ("tokens", rules.max_tokens, tokens),
        ("rows", rules.max_rows, rows),
        ("padded tokens", rules.max_padded_tokens, rows * longest),
    ):
        device.limit(f"steps hold {most} {name}, the case has {wanted}", most is None or wanted <= most)
    policy = device.platform.shape_policy(usual_limits(device, tokens, rows, pages=pages, block_size=block_size))
    key = policy.bucket(
        num_tokens=tokens, num_reqs=rows, num_samples=rows, max_query_len=longest, num_pages=pages, features=()
    )
    assert key.num_tokens >= tokens and key.num_reqs >= rows, f"the shape policy put {tokens} tokens in {key}"
    if policy.keys():
        return key if key.num_pages else _wider(key, 0, 0, pages)
    extra = padding.tokens
    if device.capabilities.padding == "dummy_request":
        extra = max(extra, padding.rows)  # a token for each
    return _wider(key, extra, padding.rows, pages)


def _wider(key: ShapeKey, tokens: int, rows: int, pages: int) -> ShapeKey:
    return ShapeKey(
        num_tokens=key.num_tokens + tokens,
        num_reqs=key.num_reqs + rows,
        num_samples=key.num_samples + rows,
        max_query_len=key.max_query_len,
        num_pages=max(key.num_pages, pages),
        features=key.features,
    )
