"""npu_fused_infer_attention_score, its variant `.out`, the size of its workspace, and its second version (which has
sinks). Source: _op_plugin_docs.py, npu_fused_infer_attention_score and npu_fused_infer_attention_score_v2."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip_npu_simulator import graphs
from anychip_npu_simulator.calls import Arguments, simulates
from anychip_npu_simulator.ops.attention_arguments import V1, V2, Names, kv_heads, lengths, query_dim, row_lengths
from anychip_npu_simulator.ops.attention_checks import check

_SPLITS, _WORKSPACE_BASE = 8, 16384
"""The vendor publishes no formula for workspaces; the simulator's is the partial sums of a split over the keys."""


def _rows_of(x: Tensor, layout: str, heads: int, counts: list[int], starts: list[int]) -> list[Tensor]:
    """Each row's [length, heads, dim] of a tensor in a layout."""
    if layout == "TND":
        return [x[start : start + count] for start, count in zip(starts, counts, strict=True)]
    if layout == "BSH":
        x = x.unflatten(-1, (heads, -1))
    elif layout == "BNSD":
        x = x.transpose(1, 2)
    return [x[row, :count] for row, count in enumerate(counts)]


def _paged(cache: Tensor, table: Tensor, count: int, size: int, heads: int) -> Tensor:
    """The first `count` tokens of a row: [count, heads, dim]."""
    pages = cache[table[: -(-count // size)].long()]
    pages = pages.transpose(1, 2) if cache.dim() == 4 else pages.unflatten(-1, (heads, -1))
    return pages.flatten(0, 1)[:count]


def _hidden(a: Arguments, row: int, queries: int, keys: int) -> Tensor | None:
    """True where a query does not see a key: [queries, keys]."""
    mode = a.sparse_mode
    if mode in (0, 1):
        if a.atten_mask is None:
            return None
        mask = a.atten_mask.bool()
        mask = mask.reshape(-1, *mask.shape[-2:]) if mask.dim() > 2 else mask[None]
        return mask[row if len(mask) > 1 else 0, :queries, :keys]
    at, key = torch.arange(queries)[:, None], torch.arange(keys)[None]
    if mode == 2:
        return key > at
    at = at + keys - queries  # modes 3 and 4 are aligned to the last query and the last key
    if mode == 3:
        return key > at
    return (key > at + a.next_tokens) | (key < at - a.pre_tokens)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[queries, heads, dim], and the log of the sum of exponents [queries, heads, 1]. A query that sees nothing: 0."""
    if not len(k):
        return q.new_zeros(*q.shape[:2], v.shape[-1]), torch.full((*q.shape[:2], 1), torch.inf)
    shared = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.float().repeat_interleave(shared, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), wide_k) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    log_sum = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:
        log_sum = torch.logaddexp(log_sum, sinks.float()[:, None, None].expand_as(log_sum))
    weights = torch.exp(scores - log_sum).masked_fill(log_sum.isneginf(), 0.0)
    out = torch.einsum("hqk,khd->qhd", weights, wide_v).to(q.dtype)
    return out, log_sum.transpose(0, 1).contiguous()


def _starts(counts: list[int]) -> list[int]:
    return [sum(counts[:row]) for row in range(len(counts))]


def _compute(a: Arguments, names: Names, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    layout, heads, groups = a.input_layout, int(getattr(a, names.heads)), kv_heads(a, names)
    queries, kv = list(row_lengths(a, names)), lengths(a, names.kv_lengths)
    q_rows = _rows_of(a.query, layout, heads, queries, _starts(queries))
    if a.query_rope is not None:
        ropes = _rows_of(a.query_rope, layout, heads, queries, _starts(queries))
        q_rows = [torch.cat(pair, -1) for pair in zip(q_rows, ropes, strict=True)]
    scale = float(a.scale if names is V1 else a.softmax_scale)
    out = torch.zeros_like(a.query)
    out_rows = _rows_of(out, layout, heads, queries, _starts(queries))
    sums: list[Tensor] = []
    for row, q in enumerate(q_rows):
        k, v = _keys_and_values(a, row, kv, groups, layout)
        result, log_sum = _attend(q, k, v, _hidden(a, row, len(q), len(k)), scale, sinks)
        out_rows[row].copy_(result)
        sums.append(log_sum)
    return out, _log_sums(a, sums, layout) if getattr(a, names.lse) else torch.empty(0)


def _keys_and_values(a: Arguments, row: int, kv: list[int] | None, groups: int, layout: str) -> tuple[Tensor, Tensor]:
    if a.block_table is not None:
        assert kv is not None
        table = a.block_table[row]
        most = int(table[: -(-kv[row] // a.block_size)].max()) if kv[row] else 0
        a.check(0 <= most < len(a.key), "block_table", f"{most} in row {row}", f"0 to {len(a.key) - 1}")
        k, v = (_paged(x, table, kv[row], a.block_size, groups) for x in (a.key, a.value))
        if a.key_rope is not None:
            k = torch.cat((k, _paged(a.key_rope, table, kv[row], a.block_size, groups)), -1)
        return k, v
    if layout == "TND":
        assert kv is not None
        begin, end = ([0, *kv])[row : row + 2]
        k, v = a.key[begin:end], a.value[begin:end]
        return (torch.cat((k, a.key_rope[begin:end]), -1) if a.key_rope is not None else k), v
    size = a.key.shape[2 if layout == "BNSD" else 1]
    count = size if kv is None else kv[0 if len(kv) == 1 else row]
    counts = [count] * len(a.key)
    k, v = (_rows_of(x, layout, groups, counts, [])[row] for x in (a.key, a.value))
    if a.key_rope is not None:
        k = torch.cat((k, _rows_of(a.key_rope, layout, groups, counts, [])[row]), -1)
    return k, v


def _log_sums(a: Arguments, sums: list[Tensor], layout: str) -> Tensor:
    """TND: [tokens, heads, 1], else [batch, heads, S, 1]."""
    if layout == "TND":
        return torch.cat(sums)
    size = a.query.shape[2 if layout == "BNSD" else 1]
    whole = torch.full((len(sums), sums[0].shape[1], size, 1), torch.inf)
    for row, log_sum in enumerate(sums):
        whole[row, :, : len(log_sum)] = log_sum.transpose(0, 1)
    return whole


def _workspace(a: Arguments, names: Names) -> int:
    """Bytes."""
    tokens = sum(row_lengths(a, names))
    return _WORKSPACE_BASE + 4 * _SPLITS * tokens * int(getattr(a, names.heads)) * (query_dim(a, names) + 2)


def _check_out(a: Arguments, names: Names) -> None:
    check(a, names)
    a.check(len(a.out) == 2, "out", f"{len(a.out)} tensors", "two: attention_out and softmax_lse")
    shape = tuple(a.query.shape)
    a.check(
        tuple(a.out[0].shape) == shape and a.out[0].dtype == a.query.dtype,
        "out",
        f"{tuple(a.out[0].shape)} {a.out[0].dtype}",
        f"{shape} {a.query.dtype}, as query",
    )
    need = _workspace(a, names)
    if graphs.active() or graphs.updating():
        a.check(a.workspace is not None, "workspace", None, f"{need} bytes sized ahead, as graphs keep their addresses")
    if a.workspace is not None:
        have = a.workspace.numel() * a.workspace.element_size()
        a.check(have >= need, "workspace", f"{have} bytes", f"{need} or more, as the op's get_max_workspace says")


_DOCUMENT = "npu_fused_infer_attention_score"
_V2 = "npu_fused_infer_attention_score_v2"
_LENGTHS = (V1.query_lengths, V1.kv_lengths)
_LENGTHS_V2 = (V2.query_lengths, V2.kv_lengths)


@simulates(_DOCUMENT, lambda a: check(a, V1), _DOCUMENT, host_lengths=_LENGTHS)
@simulates(f"{_DOCUMENT}.out", lambda a: _check_out(a, V1), _DOCUMENT, host_lengths=_LENGTHS, opinion=_DOCUMENT)
def fused_infer_attention_score(a: Arguments) -> tuple[Tensor, Tensor]:
    return _compute(a, V1, None)


@simulates(f"_{_DOCUMENT}_get_max_workspace", lambda a: check(a, V1), _DOCUMENT, opinion=_DOCUMENT, results=False)
def max_workspace(a: Arguments) -> Tensor:
    return torch.empty(_workspace(a, V1), dtype=torch.uint8)


def _check_v2(a: Arguments) -> None:
    check(a, V2)
    a.dtype("learnable_sink", torch.bfloat16)
    a.shape("learnable_sink", (a.num_query_heads,))


@simulates(_V2, _check_v2, _V2, host_lengths=_LENGTHS_V2)
def fused_infer_attention_score_v2(a: Arguments) -> tuple[Tensor, Tensor]:
    """The second version's `learnable_sink` is one logit a head, which takes weight and gives no value."""
    return _compute(a, V2, a.learnable_sink)


def _check_v2_out(a: Arguments) -> None:
    _check_v2(a)
    _check_out(a, V2)


@simulates(f"{_V2}.out", _check_v2_out, _V2, host_lengths=_LENGTHS_V2, opinion=_V2)
def fused_infer_attention_score_v2_out(a: Arguments) -> tuple[Tensor, Tensor]:
    return _compute(a, V2, a.learnable_sink)


@simulates(f"_{_V2}_get_max_workspace", _check_v2, _V2, opinion=_V2, results=False)
def max_workspace_v2(a: Arguments) -> Tensor:
    return torch.empty(_workspace(a, V2), dtype=torch.uint8)
