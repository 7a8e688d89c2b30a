"""One attention call: the case, a poisoned pool with each row's context, inputs. paged_judge.py judges it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from anychip.plugin_api import AttentionBackend, AttentionLayer, AttentionSpec, PartialAttention, QKNorm, Rope
from anychip.types import DType, cdiv
from anychip_conformance import needles
from anychip_conformance.batch import Padding, PagedBatch, Row, paged_batch
from anychip_conformance.choices import CaseDtype
from anychip_conformance.device import Device
from anychip_conformance.forms import laid_out

GUARD = 3
"""Rows of storage before and behind an output that must stay as they were."""
_NORM_EPS = 1e-5
_SPARE_BLOCKS = 3
_NEAR_BLOCKS = 8
_MAX_POSITIONS = 4096
_FAR_BYTES = 2**32 + 2**28
_BYTE_DTYPES: dict[str, DType] = {"fp8": "float8_e4m3fn", "int8": "int8"}
BYTE_MAX = {"float8_e4m3fn": 448.0, "int8": 127.0}


class AttentionCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`page` picks among the backend's block sizes. `magnitude` scales queries. `far` puts the blocks at the end of a
    large pool. `scale` None: 1 / sqrt(head_dim). `strided`: q, k and v are slices of one packed projection."""

    rows: tuple[Row, ...]
    dtype: CaseDtype = "any"
    kv: Literal["same", "fp8", "int8"] = "same"
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    any_head_dim: bool = True
    """Whether another head_dim does as well, on devices that have not this one."""
    page: int = 0
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    scale: float | None = None
    magnitude: float = 1.0
    value_offset: float = 0.0
    pad_tokens: int = 0
    pad_rows: int = 0
    strided: bool = False
    guarded: bool = False
    far: bool = False
    rope: Literal["none", "neox", "interleaved"] = "none"
    rotary_fraction: float = 1.0
    qk_norm: bool = False
    read_only: bool = False
    """k and v are None: the layer reads what another has written."""
    head_scales: bool = False
    """Quantized caches: a scale per head instead of one."""
    invariant: bool = False
    lse: bool = False
    """The call gives the log-sum-exp as well."""
    needles: bool = False
    """A few keys of each context have all the weight, so that missing one shows."""
    seed: int = 0

    @property
    def kv_dtype(self) -> DType:
        return self.dtype if self.kv == "same" else _BYTE_DTYPES[self.kv]

    @property
    def score_scale(self) -> float:
        """What multiplies q.k."""
        return float(self.head_dim**-0.5 if self.scale is None else self.scale)

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            window=self.window,
            softcap=self.softcap,
            alibi=self.alibi,
            sinks=self.sinks,
            lse=self.lse,
            invariant=self.invariant,
        )


def backend_for(device: Device, case: AttentionCase) -> AttentionBackend:
    """The backend, once every capability that the case needs is declared."""
    caps, platform = device.capabilities, device.platform
    device.need_dtype(case.dtype)

    def refused() -> object:
        return platform.attention(case.spec)

    if caps.head_dims is not None:
        device.need(f"head_dim {case.head_dim}", case.head_dim in caps.head_dims, refused)
    device.need(f"kv dtype {case.kv_dtype}", case.kv_dtype in caps.kv_dtypes, refused)
    for name, wanted, declared in (
        ("sliding_window", case.window is not None, caps.sliding_window),
        ("softcap", case.softcap is not None, caps.softcap),
        ("alibi", case.alibi, caps.alibi),
        ("sinks", case.sinks, caps.sinks),
        ("attention_lse", case.lse, caps.attention_lse),
        ("batch_invariant", case.invariant, caps.batch_invariant),
    ):
        if wanted:
            device.need(name, declared, refused)
    return platform.attention(case.spec)


@dataclass(slots=True)
class Call:
    """One forward call, made and not yet judged."""

    case: AttentionCase
    backend: AttentionBackend
    batch: PagedBatch
    cache: Any
    layer: AttentionLayer
    q: Tensor
    k: Tensor | None
    v: Tensor | None
    out: Tensor | None
    rope: Rope | None
    qk_norm: QKNorm | None
    watched: list[int]
    """Blocks that are compared: all of them, or of a far pool its ends."""
    block_size: int
    raw: Tensor

    @classmethod
    def make(
        cls,
        device: Device,
        case: AttentionCase,
        *,
        tables: list[list[int]] | None = None,
        num_blocks: int | None = None,
        least_pages: int = 1,
    ) -> Call:
        """A poisoned pool, each row's context written at scattered blocks, and inputs. `tables` chooses the blocks,
        `least_pages` makes room in the step's shape and the pool for rows of so many."""
        backend = backend_for(device, case)
        rng = np.random.default_rng(case.seed)
        sizes = backend.kv_layout().block_sizes
        size = sizes[case.page % len(sizes)]
        rows = [row for row in case.rows if row.query or device.capabilities.padding == "zero_rows"]
        pages = [cdiv(row.context(size) + row.query, size) for row in rows]
        if num_blocks is None:
            num_blocks = 1 + sum(pages) + _SPARE_BLOCKS + least_pages * len(pages)
            if case.far:
                num_blocks = _far_pool(device, num_blocks, size, backend.kv_layout().page_bytes(size))
        if tables is None:
            # Drawn apart, so that content does not depend on where it lies.
            tables = _scattered(np.random.default_rng((case.seed, 1)), pages, num_blocks, far=case.far)
        batch = paged_batch(
            device,
            rows,
            block_size=size,
            tables=tables,
            padding=Padding(tokens=case.pad_tokens, rows=case.pad_rows),
            window=case.window,
            shared_slots=case.read_only,
            least_pages=least_pages,
        )
        raw = device.platform.empty((num_blocks * backend.kv_layout().page_bytes(size),), "uint8", "kv")
        cache = backend.make_cache(raw, num_blocks, size)
        layer = _layer(device, case, rng)
        watched = list(range(num_blocks))
        if case.far:
            watched = sorted(
                {*range(min(_NEAR_BLOCKS, num_blocks)), *range(num_blocks - sum(pages) - _SPARE_BLOCKS, num_blocks)}
            )
        cache = _filled(device, case, backend, cache, batch, watched, size, rng)
        q, k, v = _inputs(device, case, batch.key.num_tokens, rng)
        longest = max((row.context(size) + row.query for row in rows), default=0)
        rope, qk_norm = _rope(device, case, longest), _qk_norm(device, case, rng)
        out = None
        if case.guarded:
            shape = (batch.key.num_tokens + 2 * GUARD, case.num_heads, case.head_dim)
            out = device.tensor(np.full(shape, np.nan), case.dtype, written=True)
        if case.read_only:
            k = v = None
        return cls(case, backend, batch, cache, layer, q, k, v, out, rope, qk_norm, watched, size, raw)

    def run(self) -> Tensor:
        """The output, [num_tokens, num_heads, head_dim]; the cache is replaced by the one that came back."""
        result, self.cache = self._made(self.backend.forward)
        return result

    def run_with_lse(self) -> PartialAttention:
        """As run, with the log-sum-exp."""
        result, self.cache = self._made(self.backend.forward_with_lse)
        return result

    def _made(self, forward: Callable[..., tuple[Any, Any]]) -> tuple[Any, Any]:
        return forward(
            self.q,
            self.k,
            self.v,
            self.cache,
            self.backend.plan(self.batch.view, self.batch.key, group=0),
            self.layer,
            rope=self.rope,
            qk_norm=self.qk_norm,
            out=None if self.out is None else self.out[GUARD:-GUARD],
        )

    def blocks(self) -> Tensor:
        """The watched blocks in canonical form, [len(watched), 2, block_size, num_kv_heads, head_dim]."""
        return self.backend.export_blocks(self.cache, self.watched)

    def places(self, block_ids: np.ndarray | list[int]) -> np.ndarray:
        """Where blocks stand among the watched ones."""
        return np.searchsorted(self.watched, block_ids)


# -- making ---------------------------------------------------------------------------------------------------


def _far_pool(device: Device, least: int, size: int, page_bytes: int) -> int:
    """Blocks enough that the pool's bytes, and in a dtype of two bytes its elements, pass what 32 bits count. Memory
    that nobody touches costs nothing on a host; a cache that is copied at every write is held to a few blocks."""
    most = device.capabilities.max_slots
    wanted = _FAR_BYTES // page_bytes if device.capabilities.kv_write != "functional" else least
    return max(least, wanted if most is None else min(wanted, most // size))


def _scattered(rng: np.random.Generator, pages: list[int], num_blocks: int, *, far: bool) -> list[list[int]]:
    """Distinct blocks in no order, never the null block; at the pool's end where `far`."""
    total = sum(pages)
    first = num_blocks - total if far else 1
    ids = (rng.permutation(num_blocks - first)[:total] + first).tolist()
    tables = []
    for count in pages:
        tables.append(ids[:count])
        ids = ids[count:]
    return tables


def _layer(device: Device, case: AttentionCase, rng: np.random.Generator) -> AttentionLayer:
    layer = AttentionLayer(index=0, scale=case.score_scale, ops=device.ops.ops)
    if case.alibi:
        slopes = 2.0 ** -(8.0 * np.arange(1, case.num_heads + 1) / case.num_heads)
        layer.alibi_slopes = device.held(slopes, "float32")
    if case.sinks:
        layer.sinks = device.held(rng.normal(size=case.num_heads), "float32")
    if case.kv != "same":
        count = case.num_kv_heads if case.head_scales else 1
        # Values of a few units: half of the range, so that some saturate.
        unit = 4.0 / BYTE_MAX[case.kv_dtype]
        layer.k_scale = device.held(unit * rng.uniform(0.3, 1.0, count), "float32")
        layer.v_scale = device.held(unit * rng.uniform(0.3, 1.0, count), "float32")
    return layer


def _filled(
    device: Device,
    case: AttentionCase,
    backend: AttentionBackend,
    cache: Any,
    batch: PagedBatch,
    watched: list[int],
    size: int,
    rng: np.random.Generator,
) -> Any:
    """Poison everywhere, then each row's keys and values; read-only layers hold the new tokens' as well."""
    shape = (2, size, case.num_kv_heads, case.head_dim)
    used = sorted({block for table in batch.tables for block in table})
    poison = np.full((1, *shape), device.poison)
    filler = _canonical(device, case, poison)
    chunk = max(1, 2**22 // filler.numel())
    for first in range(0, len(watched), chunk):
        ids = watched[first : first + chunk]
        cache = backend.import_blocks(cache, ids, filler.expand(len(ids), *shape).contiguous())
    content = {block: np.full(shape, device.poison) for block in used}
    for table, context, query in zip(batch.tables, batch.contexts, batch.queries, strict=True):
        length = context + (query if case.read_only else 0)
        if case.needles:
            tokens = needles.tokens(rng, length, query, *shape[2:], case.score_scale, case.window)
        else:
            tokens = rng.normal(size=(2, length, case.num_kv_heads, case.head_dim))
        tokens[1] += case.value_offset
        for page in range(cdiv(length, size)):
            part = tokens[:, page * size : (page + 1) * size]
            content[table[page]][:, : part.shape[1]] = part
    if used:
        data = _canonical(device, case, np.stack([content[block] for block in used]))
        cache = backend.import_blocks(cache, used, data)
    return cache


def _canonical(device: Device, case: AttentionCase, blocks: np.ndarray) -> Tensor:
    """[blocks, 2, size, kv_heads, dim] in the cache's dtype, as bytes where that is one byte wide."""
    if case.kv == "same":
        return device.held(blocks, case.dtype)
    most = BYTE_MAX[case.kv_dtype]
    scaled = np.nan_to_num(blocks, nan=most * 2) if case.kv == "int8" else blocks
    scaled = np.clip(scaled * most / 8.0, -most, most)
    return device.held(scaled.round() if case.kv == "int8" else scaled, case.kv_dtype).view(torch.uint8)


def _inputs(
    device: Device, case: AttentionCase, num_tokens: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    heads = [case.num_heads, case.num_kv_heads, case.num_kv_heads]
    packed = rng.normal(size=(num_tokens, sum(heads), case.head_dim))
    packed[:, : case.num_heads] *= case.magnitude
    if case.needles:
        packed[:, : case.num_heads] = needles.direction(case.head_dim, case.score_scale)
    packed[:, -case.num_kv_heads :] += case.value_offset
    whole = device.held(packed, case.dtype)
    q, k, v = torch.split(whole, heads, dim=1)
    if case.strided:
        return q, k, v
    q, k, v = (laid_out(x.contiguous(), device.form) for x in (q, k, v))
    return q, k, v


def _rope(device: Device, case: AttentionCase, longest: int) -> Rope | None:
    if case.rope == "none":
        return None
    rotary_dim = max(2, int(case.head_dim * case.rotary_fraction) // 2 * 2)
    angle = np.arange(max(_MAX_POSITIONS, longest))[:, None] * 100.0 ** (
        -np.arange(rotary_dim // 2) / (rotary_dim // 2)
    )
    return Rope(
        cos=device.held(np.cos(angle), "float32"),
        sin=device.held(np.sin(angle), "float32"),
        rotary_dim=rotary_dim,
        interleaved=case.rope == "interleaved",
    )


def _qk_norm(device: Device, case: AttentionCase, rng: np.random.Generator) -> QKNorm | None:
    if not case.qk_norm:
        return None
    weights = [device.held(1.0 + 0.2 * rng.normal(size=case.head_dim), case.dtype) for _ in range(2)]
    return QKNorm(q_weight=weights[0], k_weight=weights[1], eps=_NORM_EPS)
