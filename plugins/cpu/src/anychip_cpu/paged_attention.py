"""Paged attention in one compiled call per layer: norm, rotation, the write and the attention itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import last_copies
from anychip.plugin_api import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    BatchView,
    KVLayout,
    PartialAttention,
    QKNorm,
    Recorder,
    Rope,
    ShapeKey,
    Unsupported,
)
from anychip_cpu.native import DTYPES, Kernels, fields
from anychip_cpu.packing import round_up

BLOCK_SIZES = (16, 32, 64, 128, 256)
_LANES = 16
"""Head dims are padded to a multiple, so that vectors never leave their head."""


@dataclass(slots=True)
class CpuPlan:
    """kernels/plan.h's StepPlan over a step's arrays: query_start, seq_lens, block_table, slots, positions."""

    native: object
    arrays: tuple[Tensor, ...]
    block_size: int
    num_tokens: int
    """Of rows: behind them is padding, whose output is zeros."""


class CpuPagedAttention(AttentionBackend):
    """The cache's layout is kernels/attention_types.h's: what products want, not what core sees."""

    def __init__(self, spec: AttentionSpec, kernels: Kernels, name: str) -> None:
        reasons = []
        if spec.kind != "decoder":
            reasons.append(f"attention of kind {spec.kind} is not implemented")
        if spec.kv_dtype not in (spec.dtype, "int8", "float8_e4m3fn"):
            reasons.append(
                f"a {spec.kv_dtype} cache under {spec.dtype} queries; there are {spec.dtype}, int8, float8_e4m3fn"
            )
        if reasons:
            raise Unsupported("anychip-cpu attention", reasons)
        super().__init__(spec)
        self.name = f"cpu-{name}"
        self._kernels = kernels
        self._padded_dim = round_up(spec.head_dim, _LANES)
        self._dtype = getattr(torch, spec.kv_dtype)
        self._known: tuple[Any, ...] | None = None
        """What `_described` last described, and the description."""

    # -- the cache ----------------------------------------------------------------------------------------

    def kv_layout(self) -> KVLayout:
        per_token = 2 * self.spec.num_kv_heads * self._padded_dim * self._dtype.itemsize
        return KVLayout(block_sizes=BLOCK_SIZES, page_bytes=lambda size: per_token * size, opaque=True)

    def make_cache(self, raw: Tensor, num_blocks: int, block_size: int) -> Tensor:
        return raw.view(num_blocks, 2, -1)

    def copy_blocks(self, cache: Tensor, src: Sequence[int], dst: Sequence[int]) -> Tensor:
        sources, destinations = last_copies(src, dst)
        cache[destinations] = cache[sources]
        return cache

    def zero_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        cache[list(ids)] = 0
        return cache

    def export_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        keys, values = self._views(cache[list(ids)])
        return torch.stack([self._flat(keys), self._flat(values)], dim=1)[..., : self.spec.head_dim].contiguous()

    def import_blocks(self, cache: Tensor, ids: Sequence[int], data: Tensor) -> Tensor:
        pages = cache[list(ids)]
        spare = self._padded_dim - self.spec.head_dim
        # Keys are multiplied pair by pair of dimensions: an odd one's neighbour counts, and must be zero.
        padded = torch.nn.functional.pad(data, (0, spare))
        for view, plane in zip(self._views(pages), padded.unbind(1), strict=True):
            view.copy_(plane.reshape(view.shape))
        cache[list(ids)] = pages
        return cache

    def _views(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values in pages [blocks, 2, bytes] as [blocks, block_size, num_kv_heads, padded_dim]; where one
        lies in pairs, it is two: tokens [block_size / 2, 2] or dimensions [padded_dim / 2, 2]."""
        heads, dim, width = self.spec.num_kv_heads, self._padded_dim, self._dtype.itemsize
        blocks, size = len(pages), pages.shape[2] // (heads * dim * width)
        typed = pages if width == 1 else pages.view(self._dtype)
        keys, values = typed[:, 0], typed[:, 1]
        if width == 2:
            keys = keys.view(blocks, heads, dim // 2, size, 2).permute(0, 3, 1, 2, 4)
            return keys, values.view(blocks, heads, size // 2, dim, 2).permute(0, 2, 4, 1, 3)
        keys = keys.view(blocks, heads, dim, size).permute(0, 3, 1, 2)
        return keys, values.view(blocks, heads, size, dim).transpose(1, 2)

    def _flat(self, view: Tensor) -> Tensor:
        heads, dim = self.spec.num_kv_heads, self._padded_dim
        return view.reshape(len(view), prod(view.shape[1:]) // (heads * dim), heads, dim)  # of no blocks, too

    # -- a step -------------------------------------------------------------------------------------------

    def plan(
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: object | None = None,
        recorder: Recorder | None = None,
    ) -> CpuPlan:
        arrays = batch.query_start, batch.seq_lens, batch.block_table, batch.slot_mapping, batch.positions
        if isinstance(into, CpuPlan):
            for held, given in zip(into.arrays, arrays, strict=True):
                if held is not given:
                    held.copy_(given)
            into.num_tokens = self._kernels.renew_plan(into.native)
            return into
        arrays = tuple(
            given.to(torch.int64 if given is batch.slot_mapping else torch.int32).contiguous() for given in arrays
        )
        starts, lengths, table, slots, positions = arrays
        spec = self.spec
        native = self._kernels.new_plan(
            starts.data_ptr(), lengths.data_ptr(), table.data_ptr(), slots.data_ptr(), positions.data_ptr(),
            len(lengths), len(slots), table.stride(0), spec.num_kv_heads, spec.num_heads // spec.num_kv_heads,
            spec.window or 0,
        )  # fmt: skip
        return CpuPlan(native, arrays, batch.block_size, self._kernels.renew_plan(native))

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: Tensor,
        plan: CpuPlan,
        layer: AttentionLayer,
        *,
        rope: Rope | None = None,
        qk_norm: QKNorm | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`lse` [num_tokens, num_heads] receives what forward_with_lse promises for tokens of rows."""
        q, ldq = _heads_of(q)
        keys, ldk, values, ldv = 0, 0, 0, 0
        if k is not None and v is not None:
            k, ldk = _heads_of(k)
            v, ldv = _heads_of(v)
            keys, values = k.data_ptr(), v.data_ptr()
        fits = out is not None and out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
        result = out if out is not None and fits else torch.empty(q.shape, dtype=q.dtype)
        self._kernels.attention(
            self._described(layer, rope, qk_norm, plan.block_size), plan.native,
            q.data_ptr(), ldq, keys, ldk, values, ldv, cache.data_ptr(), result.data_ptr(),
            *(() if lse is None else (lse.data_ptr(),)),
        )  # fmt: skip
        return result, cache

    def forward_with_lse(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: Tensor,
        plan: CpuPlan,
        layer: AttentionLayer,
        *,
        rope: Rope | None = None,
        qk_norm: QKNorm | None = None,
        out: Tensor | None = None,
    ) -> tuple[PartialAttention, Tensor]:
        lse = torch.full(q.shape[:2], -torch.inf)
        result, cache = self.forward(q, k, v, cache, plan, layer, rope=rope, qk_norm=qk_norm, lse=lse)
        return PartialAttention(result, lse), cache

    def _described(self, layer: AttentionLayer, rope: Rope | None, qk_norm: QKNorm | None, block_size: int) -> bytes:
        """kernels/attention_types.h's Layer, made anew when something in it is another object than before."""
        known = self._known
        if (
            known is not None and known[0] is layer and known[1] is rope and known[2] is qk_norm
            and known[3] == block_size and known[4] is layer.k_scale and known[5] is layer.v_scale
            and known[6] is layer.sinks and known[7] is layer.alibi_slopes
        ):  # fmt: skip
            return known[8]
        spec = self.spec
        k_scale = layer.k_scale
        turned = (0, 0, 0, 0) if rope is None else (
            rope.cos.data_ptr(), rope.sin.data_ptr(), rope.rotary_dim, int(rope.interleaved)
        )  # fmt: skip
        normed = (0, 0, 0.0, 0) if qk_norm is None else (
            qk_norm.q_weight.data_ptr(), qk_norm.k_weight.data_ptr(), float(qk_norm.eps), int(qk_norm.unit_offset)
        )  # fmt: skip
        described = fields(
            spec.num_heads, spec.num_kv_heads, spec.head_dim, self._padded_dim, block_size,
            DTYPES[spec.dtype], DTYPES[spec.kv_dtype], spec.window or 0, float(layer.scale), float(spec.softcap or 0),
            _address(k_scale), _address(layer.v_scale), int(k_scale is not None and k_scale.numel() > 1),
            _address(layer.sinks), _address(layer.alibi_slopes), *turned, *normed,
        )  # fmt: skip
        self._known = (
            layer, rope, qk_norm, block_size, k_scale, layer.v_scale, layer.sinks, layer.alibi_slopes, described
        )  # fmt: skip
        return described


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _heads_of(x: Tensor) -> tuple[Tensor, int]:
    """x [num_tokens, heads, head_dim] with each token's heads together, and how far tokens lie apart."""
    if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        x = x.contiguous()
    return x, x.stride(0)
