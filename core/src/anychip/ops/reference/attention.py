"""Reference paged attention: one row at a time, in the plainest order. Correct on any torch device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from anychip.ops.reference.block_moves import last_copies
from anychip.plugin_api import (
    FP8_MAX,
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    BatchView,
    KVLayout,
    PartialAttention,
    Unsupported,
    dense_page_bytes,
)

BLOCK_SIZES = (16, 32, 64, 128, 256)

BYTE_RANGES = {"float8_e4m3fn": FP8_MAX, "int8": 127.0}
"""Cache dtypes of one byte, and the largest value that each holds."""


class DenseCacheAttention(AttentionBackend):
    """Storage shared by backends that keep [num_blocks, 2, block_size, num_kv_heads, head_dim]: keys, values, in the
    queries' dtype or in one byte each, as fp8 or int8 with the layer's scales. What such a backend cannot serve is
    refused."""

    block_sizes: tuple[int, ...] = BLOCK_SIZES

    def __init__(self, spec: AttentionSpec) -> None:
        reasons = []
        if spec.kv_dtype not in (spec.dtype, *BYTE_RANGES):
            reasons.append(f"a {spec.kv_dtype} cache under {spec.dtype} queries is not implemented")
        if reasons:
            raise Unsupported(f"attention backend {self.name}", reasons)
        super().__init__(spec)

    def kv_layout(self) -> KVLayout:
        return KVLayout(block_sizes=self.block_sizes, page_bytes=dense_page_bytes(self.spec))

    def make_cache(self, raw: Tensor, num_blocks: int, block_size: int) -> Tensor:
        dtype = torch.uint8 if self.quantized else getattr(torch, self.spec.kv_dtype)
        return raw.view(dtype).view(num_blocks, 2, block_size, self.spec.num_kv_heads, self.spec.head_dim)

    def write_kv(self, k: Tensor, v: Tensor, cache: Tensor, plan: BatchView, layer: AttentionLayer) -> Tensor:
        written = (plan.slot_mapping >= 0).nonzero().squeeze(-1)
        slots = plan.slot_mapping[written]
        block, offset = slots // plan.block_size, slots % plan.block_size
        cache[block, 0, offset] = self.encode(k[written], layer.k_scale)
        cache[block, 1, offset] = self.encode(v[written], layer.v_scale)
        return cache

    @property
    def quantized(self) -> bool:
        return self.spec.kv_dtype in BYTE_RANGES

    def encode(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """Keys or values [..., num_kv_heads, head_dim] as the cache holds them: bytes where it is quantized."""
        if not self.quantized:
            return x
        most = BYTE_RANGES[self.spec.kv_dtype]
        scaled = (x.float() if scale is None else x.float() / scale.view(-1, 1)).clamp(-most, most)
        rounded = scaled.round() if self.spec.kv_dtype == "int8" else scaled
        return rounded.to(getattr(torch, self.spec.kv_dtype)).view(torch.uint8)

    def decode(self, held: Tensor, scale: Tensor | None) -> Tensor:
        """The inverse: [..., num_kv_heads, head_dim] in the queries' dtype."""
        if not self.quantized:
            return held
        wide = held.contiguous().view(getattr(torch, self.spec.kv_dtype)).float()
        return (wide if scale is None else wide * scale.view(-1, 1)).to(getattr(torch, self.spec.dtype))

    def copy_blocks(self, cache: Tensor, src: Sequence[int], dst: Sequence[int]) -> Tensor:
        sources, destinations = last_copies(src, dst)
        cache[destinations] = cache[sources]
        return cache

    def zero_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        cache[list(ids)] = 0
        return cache

    def export_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        return cache[list(ids)]

    def import_blocks(self, cache: Tensor, ids: Sequence[int], data: Tensor) -> Tensor:
        cache[list(ids)] = data
        return cache


class ReferenceAttention(DenseCacheAttention):
    """Softmax in float32, GQA by repetition."""

    name = "reference"

    def attend(
        self,
        q: Tensor,
        cache: Tensor,
        plan: BatchView,
        layer: AttentionLayer,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        result = torch.zeros_like(q) if out is None else out.zero_()
        for row, k, v in self._rows(cache, plan, layer):
            result[row] = attend_row(
                q[row], k, v, self.spec, scale=layer.scale, sinks=layer.sinks, slopes=layer.alibi_slopes
            )
        return result

    def attend_with_lse(
        self,
        q: Tensor,
        cache: Tensor,
        plan: BatchView,
        layer: AttentionLayer,
        *,
        out: Tensor | None = None,
    ) -> PartialAttention:
        result = torch.zeros_like(q) if out is None else out.zero_()
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        for row, k, v in self._rows(cache, plan, layer):
            part = attend_row_with_lse(
                q[row], k, v, self.spec, scale=layer.scale, sinks=layer.sinks, slopes=layer.alibi_slopes
            )
            result[row], lse[row] = part.out, part.lse
        return PartialAttention(result, lse)

    def _rows(self, cache: Tensor, plan: BatchView, layer: AttentionLayer) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Each row's query tokens, and its keys and values [length, num_kv_heads, head_dim]."""
        starts = plan.query_start.tolist()
        for row, length in enumerate(plan.seq_lens.tolist()):
            begin, end = starts[row], starts[row + 1]
            if end > begin:
                blocks = plan.block_table[row, : -(-length // plan.block_size)].long()
                pages = cache[blocks]  # [pages, 2, block_size, num_kv_heads, head_dim]
                k = self.decode(pages[:, 0].flatten(0, 1)[:length], layer.k_scale)
                v = self.decode(pages[:, 1].flatten(0, 1)[:length], layer.v_scale)
                yield slice(begin, end), k, v


def attend_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    *,
    scale: float,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """The last len(q) tokens of a sequence over all its keys: q [queries, num_heads, head_dim], k and v
    [length, num_kv_heads, head_dim]; sinks and ALiBi slopes [num_heads]."""
    scores, v = _scores_and_values(q, k, v, spec, scale=scale, slopes=slopes)
    return _weighted(scores, v, sinks).to(q.dtype)


def attend_row_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    *,
    scale: float,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
) -> PartialAttention:
    """attend_row, with the log-sum-exp. No keys at all: zeros, and -inf or the sinks."""
    if len(k) == 0:
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        return PartialAttention(torch.zeros_like(q), lse if sinks is None else sinks.float().expand_as(lse))
    scores, v = _scores_and_values(q, k, v, spec, scale=scale, slopes=slopes)
    lse = scores.logsumexp(dim=-1).T  # [queries, num_heads]
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float())
    return PartialAttention(_weighted(scores, v, sinks).to(q.dtype), lse)


def merge_attention(*parts: PartialAttention) -> PartialAttention:
    """Attention over the keys of all parts, which share none: each counts by its sum of exponentials. A part that saw
    nothing, -inf, changes nothing; where none saw anything, the result is as a part's."""
    most = reduce(torch.maximum, (part.lse for part in parts))
    most = most.masked_fill(most == -torch.inf, 0)
    weights = [(part.lse - most).exp() for part in parts]  # the greatest is 1, unless all are 0
    total = reduce(torch.add, weights)
    summed = reduce(
        torch.add, (weight.unsqueeze(-1) * part.out.float() for weight, part in zip(weights, parts, strict=True))
    )
    out = summed / total.clamp(min=1).unsqueeze(-1)
    return PartialAttention(out.to(parts[0].out.dtype), most + total.log())


def _scores_and_values(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, *, scale: float, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores as the softmax sees them, [num_heads, queries, keys] with -inf where a key is hidden, and values
    [keys, num_heads, head_dim], in float32."""
    repeat = spec.num_heads // spec.num_kv_heads
    k, v = k.repeat_interleave(repeat, dim=1).float(), v.repeat_interleave(repeat, dim=1).float()
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    keys = torch.arange(k.shape[0], device=q.device)
    queries = keys[k.shape[0] - q.shape[0] :].unsqueeze(-1)
    if slopes is not None:
        scores = scores + slopes.view(-1, 1, 1) * (keys - queries)
    hidden = keys > queries
    if spec.window is not None:
        hidden |= keys <= queries - spec.window
        # Blocks that a window has left behind are the null block, whose bytes may be anything.
        v = v.masked_fill(hidden.all(dim=0)[:, None, None], 0)
    return scores.masked_fill(hidden, -torch.inf), v


def _weighted(scores: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    """[queries, num_heads, head_dim]"""
    weights = softmax_with_sinks(scores, None if sinks is None else sinks.view(-1, 1, 1))
    return torch.einsum("hqk,khd->qhd", weights, v)


def visible_keys(last_keys: Tensor, valid: Tensor, num_keys: int, window: int | None) -> Tensor:
    """[num_tokens, num_keys] bool: which keys of its row each token sees, of the rows' first `num_keys`. last_keys
    [num_tokens], the last that it sees, counted from its row's first; valid [num_tokens] bool, False for padding."""
    keys, last = torch.arange(num_keys, device=last_keys.device), last_keys.unsqueeze(-1)
    visible = (keys <= last) & valid.unsqueeze(-1)
    return visible if window is None else visible & (keys > last - window)


def attend_gathered(
    q: Tensor, k: Tensor, v: Tensor, last_keys: Tensor, valid: Tensor, spec: AttentionSpec, layer: AttentionLayer
) -> tuple[Tensor, Callable[[], Tensor]]:
    """Attention of tokens that have their rows' keys and values before them, without a look at the host: q [num_tokens,
    num_heads, head_dim]; k and v [num_tokens, num_keys, num_kv_heads, head_dim]; the rest as visible_keys has it.
    The attended values as q, and what gives their log-sum-exp [num_tokens, num_heads] to those who want it."""
    visible = visible_keys(last_keys, valid, k.shape[1], spec.window)
    share = spec.num_heads // spec.num_kv_heads
    grouped = q.reshape(len(q), spec.num_kv_heads, share, spec.head_dim).float()
    scores = torch.einsum("tgsd,tkgd->tgsk", grouped, k.float()) * layer.scale
    if spec.softcap is not None:
        scores = layer.ops.softcap(x=scores, cap=spec.softcap)
    if layer.alibi_slopes is not None:
        distance = torch.arange(k.shape[1], device=q.device) - last_keys.unsqueeze(-1)
        scores = scores + layer.alibi_slopes.view(1, spec.num_kv_heads, -1, 1) * distance[:, None, None]
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    sinks = None if layer.sinks is None else layer.sinks.view(1, spec.num_kv_heads, -1, 1)
    weights = softmax_with_sinks(scores, sinks).masked_fill(~visible[:, None, None], 0)
    out = torch.einsum("tgsk,tkgd->tgsd", weights, v.float().masked_fill(~visible[:, :, None, None], 0))

    def log_sum() -> Tensor:
        total = scores.logsumexp(dim=-1).flatten(1, 2)
        if layer.sinks is not None:
            total = torch.logaddexp(total, layer.sinks)
        return total.masked_fill(~valid.unsqueeze(-1), -torch.inf)

    return out.flatten(1, 2).to(q.dtype), log_sum


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension, in which a sink, of the scores' dimensions, takes part without a place."""
    if sinks is None:
        return scores.softmax(dim=-1)
    joined = torch.cat((scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)), dim=-1)
    return joined.softmax(dim=-1)[..., :-1]
