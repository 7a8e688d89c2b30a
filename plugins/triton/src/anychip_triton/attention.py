"""Paged attention on Triton kernels, over the cache layout that core's reference has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from anychip.ops.reference import DenseCacheAttention
from anychip.plugin_api import AttentionLayer, AttentionSpec, BatchView, QKNorm, Recorder, Rope, ShapeKey, Unsupported
from anychip_triton.kernels.attention import paged_attention
from anychip_triton.kernels.kv import rotate_and_write
from anychip_triton.kernels.splits import combine_splits
from anychip_triton.launch import Launcher, split_tile
from anychip_triton.shapes import power_of_two

MAX_HEAD_DIM = 256
_BYTES = {"float8_e4m3fn": "fp8", "int8": "int8"}
_INVARIANT_SPLITS = 8
_MAX_SPLITS = 32
_LEAST_ROWS = 16
"""Rows of the smallest matrix instruction."""


@dataclass(slots=True)
class TritonPlan:
    """A step's arrays, which stay where they are while a graph replays, and what follows from its shape."""

    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    positions: Tensor
    block_size: int
    one_token: bool
    """Every row has one query token, and padded rows are as many as padded tokens."""


_ARRAYS = ("query_start", "seq_lens", "block_table", "slot_mapping", "positions")


class TritonAttention(DenseCacheAttention):
    name = "triton"

    def __init__(self, spec: AttentionSpec, launch: Launcher) -> None:
        super().__init__(spec)
        if spec.head_dim > MAX_HEAD_DIM:
            raise Unsupported("anychip-triton attention", [f"head_dim {spec.head_dim}: the largest is {MAX_HEAD_DIM}"])
        page = launch.target.page
        self.block_sizes = (page, *(size for size in type(self).block_sizes if size != page))
        self._launch = launch
        self._group = spec.num_heads // spec.num_kv_heads
        self._padded_dim = max(_LEAST_ROWS, power_of_two(spec.head_dim))
        self._item = getattr(torch, spec.dtype).itemsize
        self._bytes = _BYTES.get(spec.kv_dtype, "")
        self._one: Tensor | None = None

    def plan(
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: TritonPlan | None = None,
        recorder: Recorder | None = None,
    ) -> TritonPlan:
        if into is not None:
            for name in _ARRAYS:
                old, new = getattr(into, name), getattr(batch, name)
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
            return into
        rows, tokens = len(batch.seq_lens), len(batch.positions)
        longest = shape.max_query_len or batch.max_query_len
        arrays = {name: getattr(batch, name) for name in _ARRAYS}
        return TritonPlan(**arrays, block_size=batch.block_size, one_token=longest == 1 and rows == tokens)

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: Tensor,
        plan: TritonPlan,
        layer: AttentionLayer,
        *,
        rope: Rope | None = None,
        qk_norm: QKNorm | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        turns = rope is not None or qk_norm is not None
        if turns or k is not None:
            q = self._rotate_and_write(q, k, v, cache, plan, layer, rope if turns else None, qk_norm, turns=turns)
        return self.attend(q, cache, plan, layer, out=out), cache

    def write_kv(self, k: Tensor, v: Tensor, cache: Tensor, plan: TritonPlan, layer: AttentionLayer) -> Tensor:
        self._rotate_and_write(k, k, v, cache, plan, layer, None, None, turns=False)
        return cache

    def _rotate_and_write(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: Tensor,
        plan: TritonPlan,
        layer: AttentionLayer,
        rope: Rope | None,
        qk_norm: QKNorm | None,
        *,
        turns: bool,
    ) -> Tensor:
        """Returns the queries as attention takes them: `turns` False leaves them, and writes keys and values only."""
        spec = self.spec
        first = 0 if turns else spec.num_heads
        blocks, options = split_tile(self._launch.tiles.tile("rotate_and_write", dim=self._padded_dim))
        size = blocks["BLOCK_H"]
        num_blocks = -(-(spec.num_heads - first) // size) + (0 if k is None else -(-spec.num_kv_heads // size))
        turned = torch.empty(q.shape, dtype=q.dtype, device=q.device) if turns else q
        if k is None or v is None:
            k = v = q
        self._launch(
            rotate_and_write,
            (q.shape[0], num_blocks),
            options,
            q_out=turned, q=q, k=k, v=v,
            q_weight=q if qk_norm is None else qk_norm.q_weight, k_weight=q if qk_norm is None else qk_norm.k_weight,
            cos=q if rope is None else rope.cos, sin=q if rope is None else rope.sin,
            positions=plan.positions, slots=plan.slot_mapping,
            eps=0.0 if qk_norm is None else qk_norm.eps,
            q_token_stride=q.stride(0), q_head_stride=q.stride(1),
            k_token_stride=k.stride(0), k_head_stride=k.stride(1),
            v_token_stride=v.stride(0), v_head_stride=v.stride(1),
            FIRST_HEAD=first, NUM_HEADS=spec.num_heads, NUM_KV_HEADS=spec.num_kv_heads, PADDED_DIM=self._padded_dim,
            ROTARY_DIM=0 if rope is None else rope.rotary_dim, INTERLEAVED=rope is not None and rope.interleaved,
            HAS_NORM=qk_norm is not None, UNIT_OFFSET=qk_norm is not None and qk_norm.unit_offset,
            **blocks, **self._cache_arguments(cache, plan, layer),
        )  # fmt: skip
        return turned

    def attend(
        self, q: Tensor, cache: Tensor, plan: TritonPlan, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> Tensor:
        spec, launch = self.spec, self._launch
        tokens, rows = q.shape[0], len(plan.seq_lens)
        result = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        tile = launch.tiles.tile(
            "attention",
            dim=self._padded_dim,
            item=self._item,
            many_tokens=int(not plan.one_token),
            narrow=int(bool(self._bytes)),
        )
        blocks, options = split_tile(tile)
        described = blocks.pop("DESCRIBED", 0) and self._describable(cache, plan, blocks["BLOCK_N"])
        fewest = max(_LEAST_ROWS, power_of_two(self._group))
        blocks["BLOCK_M"] = fewest if plan.one_token else max(blocks["BLOCK_M"], fewest)
        block_q = 1 if plan.one_token else blocks["BLOCK_M"] // self._group
        tiles = rows if plan.one_token else tokens // block_q + rows + 1
        splits = self._splits(tiles) if plan.one_token else 1
        shape = (tokens, spec.num_heads, splits)
        partial = torch.empty((*shape, spec.head_dim), dtype=torch.float32, device=q.device) if splits > 1 else result
        statistics = torch.empty((*shape, 2), dtype=torch.float32, device=q.device) if splits > 1 else result
        sinks = result if layer.sinks is None else layer.sinks
        common: dict[str, Any] = {
            "out": result, "partial": partial, "statistics": statistics, "query_start": plan.query_start,
            "sinks": sinks, "num_reqs": rows, "out_token_stride": result.stride(0), "NUM_HEADS": spec.num_heads,
            "PADDED_DIM": self._padded_dim, "splits": splits,
        }  # fmt: skip
        launch(
            paged_attention,
            (tiles, spec.num_kv_heads, splits),
            options,
            q=q, seq_lens=plan.seq_lens, block_table=plan.block_table,
            slopes=result if layer.alibi_slopes is None else layer.alibi_slopes,
            scale=float(layer.scale), softcap=float(spec.softcap or 1.0), window=spec.window or 0, num_tokens=tokens,
            q_token_stride=q.stride(0), q_head_stride=q.stride(1), table_stride=plan.block_table.stride(0),
            GROUP=self._group, BLOCK_Q=block_q, HAS_WINDOW=spec.window is not None,
            HAS_SOFTCAP=spec.softcap is not None, HAS_ALIBI=layer.alibi_slopes is not None,
            HAS_SINKS=layer.sinks is not None, ONE_TOKEN=plan.one_token, SPLIT=splits > 1,
            FOLDED=layer.scale > 0 and not self._bytes and spec.softcap is None and layer.alibi_slopes is None,
            cache_rows=self._described(cache, blocks["BLOCK_N"]) if described else cache, DESCRIBED=bool(described),
            **blocks, **common, **self._cache_arguments(cache, plan, layer),
        )  # fmt: skip
        if splits > 1:
            options = split_tile(launch.tiles.tile("combine_splits", dim=self._padded_dim))[1]
            launch(
                combine_splits, (tokens, spec.num_heads), options,
                HEAD_DIM=spec.head_dim, HAS_SINKS=layer.sinks is not None, MOST=_MAX_SPLITS, **common,
            )  # fmt: skip
        return result

    def _describable(self, cache: Tensor, plan: TritonPlan, keys: int) -> bool:
        """Whether a tile of so many keys is a rectangle of the cache's rows that the device's copy engine reads."""
        whole = self._padded_dim == self.spec.head_dim and not self._bytes and cache.is_contiguous()
        return whole and not plan.one_token and plan.block_size % keys == 0

    def _described(self, cache: Tensor, keys: int) -> TensorDescriptor:
        """Made for each launch: one that is kept would keep the cache."""
        rows = cache.view(-1, cache.shape[3] * cache.shape[4])
        return TensorDescriptor.from_tensor(rows, [keys, self.spec.head_dim])

    def _cache_arguments(self, cache: Tensor, plan: TritonPlan, layer: AttentionLayer) -> Mapping[str, Any]:
        """What reading and writing kernels are told of the cache."""
        k_scale, v_scale = layer.k_scale, layer.v_scale
        if self._bytes and (k_scale is None or v_scale is None):
            if self._one is None:
                self._one = torch.ones(1, dtype=torch.float32, device=cache.device)
            k_scale = self._one if k_scale is None else k_scale
            v_scale = self._one if v_scale is None else v_scale
        return {
            "cache": cache,
            "k_scale": cache if k_scale is None else k_scale,
            "v_scale": cache if v_scale is None else v_scale,
            "k_scale_stride": 0 if k_scale is None or k_scale.numel() == 1 else 1,
            "v_scale_stride": 0 if v_scale is None or v_scale.numel() == 1 else 1,
            "block_stride": cache.stride(0),
            "value_offset": cache.stride(1),
            "slot_stride": cache.stride(2),
            "HEAD_DIM": self.spec.head_dim,
            "PAGE": plan.block_size,
            "BYTES": self._bytes,
        }

    def _splits(self, rows: int) -> int:
        """Parts of a row's keys, so that few rows still fill the device. A row's own numbers alone decide where they
        part, but how many there are depends on the shape: an invariant backend always takes the same."""
        if self.spec.invariant:
            return _INVARIANT_SPLITS
        programs = rows * self.spec.num_kv_heads
        wanted = 2 * self._launch.target.num_cores // programs
        return min(_MAX_SPLITS, power_of_two(wanted + 1) // 2) if wanted > 1 else 1
