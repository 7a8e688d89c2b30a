"""Faults of the KV cache as storage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anychip.plugin_api import AttentionLayer, BatchView
from anychip_conformance.faulty.plain import PlainAttention
from anychip_conformance.faulty.registry import fault


@fault("kv-padding-slot-written", "attention", killed_by="kv.padding_slot.001")
class PaddingSlotWritten(PlainAttention):
    """Slot -1 is an index like others."""

    def written(self, plan: BatchView) -> Tensor:
        return torch.arange(len(plan.slot_mapping))


@fault("kv-scales-ignored", "attention", killed_by="attn.kv_quantized.001")
class ScalesIgnored(PlainAttention):
    """Quantized keys and values are read without their scales."""

    def decode(self, held: Tensor, scale: Tensor | None) -> Tensor:
        return super().decode(held, None)


@fault("kv-values-take-the-keys-scale", "attention", killed_by="attn.kv_quantized.001")
class ValuesTakeTheKeysScale(PlainAttention):
    """One scale serves both."""

    def v_scale(self, layer: AttentionLayer) -> Tensor | None:
        return layer.k_scale


@fault("kv-first-heads-scale", "attention", killed_by="attn.kv_quantized.002")
class FirstHeadsScale(PlainAttention):
    """The first head's scale serves all."""

    def k_scale(self, layer: AttentionLayer) -> Tensor | None:
        return None if layer.k_scale is None else layer.k_scale[:1]


@fault("kv-fp8-overflows-to-nan", "attention", killed_by="kv.saturation.001")
class Fp8OverflowsToNan(PlainAttention):
    """Values beyond fp8's range become NaN instead of its largest."""

    def encode(self, x: Tensor, scale: Tensor | None) -> Tensor:
        if self.spec.kv_dtype != "float8_e4m3fn":
            return super().encode(x, scale)
        scaled = x.float() if scale is None else x.float() / scale.view(-1, 1)
        encoded = super().encode(x, scale)
        return encoded.masked_fill(scaled.abs() > 448.0, 0x7F)


@fault("kv-int8-wraps", "attention", killed_by="kv.saturation.002")
class Int8Wraps(PlainAttention):
    """Values beyond int8's range wrap around."""

    def encode(self, x: Tensor, scale: Tensor | None) -> Tensor:
        if self.spec.kv_dtype != "int8":
            return super().encode(x, scale)
        scaled = x.float() if scale is None else x.float() / scale.view(-1, 1)
        return scaled.round().to(torch.int32).to(torch.int8).view(torch.uint8)


@fault("kv-int8-truncates", "attention", killed_by="attn.kv_quantized.005")
class Int8Truncates(PlainAttention):
    """int8 values are cut towards zero instead of rounded."""

    def encode(self, x: Tensor, scale: Tensor | None) -> Tensor:
        if self.spec.kv_dtype != "int8":
            return super().encode(x, scale)
        scaled = x.float() if scale is None else x.float() / scale.view(-1, 1)
        return scaled.clamp(-127, 127).trunc().to(torch.int8).view(torch.uint8)


@fault("kv-shared-block-mutated", "attention", killed_by="attn.shared_prefix.001")
class SharedBlockMutated(PlainAttention):
    """Writing a step rewrites the first key of every row's first block."""

    def write_kv(self, k: Tensor, v: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer) -> Tensor:
        cache = super().write_kv(k, v, cache, plan, layer)
        for row in (plan.seq_lens > plan.block_size).nonzero().flatten().tolist():
            cache[int(plan.block_table[row, 0]), 0, 0] = k[0]
        return cache


@fault("kv-stale-block-read", "attention", killed_by="attn.reused_blocks.001")
class StaleBlockRead(PlainAttention):
    """Gathered blocks are remembered by their ids, and read again after others have filled them."""

    def keys_and_values(self, cache: Tensor, plan: BatchView, row: int, length: int, layer: AttentionLayer) -> Any:
        remembered: dict[Any, Any] = self.__dict__.setdefault("_remembered", {})
        key = (tuple(self.block_ids(plan, row, length).tolist()), length)
        if key not in remembered:
            remembered[key] = super().keys_and_values(cache, plan, row, length, layer)
        return remembered[key]


@fault("kv-copy-keys-only", "attention", killed_by="kv.copy_blocks.001")
class CopyKeysOnly(PlainAttention):
    """A copied block has its old values."""

    def copy_blocks(self, cache: Tensor, src: Sequence[int], dst: Sequence[int]) -> Tensor:
        cache[list(dst), 0] = cache[list(src), 0]
        return cache


@fault("kv-copy-reversed", "attention", killed_by="kv.copy_blocks.001")
class CopyReversed(PlainAttention):
    """Sources become their destinations."""

    def copy_blocks(self, cache: Tensor, src: Sequence[int], dst: Sequence[int]) -> Tensor:
        return super().copy_blocks(cache, dst, src)


@fault("kv-zero-first-only", "attention", killed_by="kv.zero_blocks.001")
class ZeroFirstOnly(PlainAttention):
    """One block is zeroed of those asked for."""

    def zero_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        return super().zero_blocks(cache, list(ids)[:1])


@fault("kv-import-sorted", "attention", killed_by="kv.export_import.001")
class ImportSorted(PlainAttention):
    """Blocks come out in the order of their ids instead of the caller's."""

    def export_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        return super().export_blocks(cache, sorted(ids))


@fault("kv-copied-storage", "attention", killed_by="attn.prefill.001")
class CopiedStorage(PlainAttention):
    """A cache that is not in the memory that core gave: groups would no longer share it."""

    def make_cache(self, raw: Tensor, num_blocks: int, block_size: int) -> Tensor:
        return super().make_cache(raw.clone(), num_blocks, block_size)


@fault("kv-page-too-small", "attention", killed_by="kv.layout.001")
class PageTooSmall(PlainAttention):
    """A page that holds keys and no values."""

    def kv_layout(self) -> Any:
        honest = super().kv_layout()
        return dataclasses.replace(honest, page_bytes=lambda size: honest.page_bytes(size) // 2)
