"""Routing of tokens to experts and back. Source: _op_plugin_docs.py under each name; aclnnMoeTokenUnpermute for the
dtypes of npu_moe_token_unpermute, whose document names int64 indices and shows int32."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip_npu_simulator.calls import Arguments, simulates
from anychip_npu_simulator.ops.elementwise import FLOATS

_MAX_K, _MAX_EXPERTS, _GROUP_STEP, _MAX_ROUTED = 1024, 2048, 32, 10240
_NO_QUANT, _DYNAMIC = -1, 1
COUNTS, PAIRS = 1, 2
INT8_MAX = 127.0


def _largest(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, the lower index first among equals."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


# -- gating ------------------------------------------------------------------------------------------------


def _check_softmax(a: Arguments) -> None:
    a.dtype("x", *FLOATS)
    a.dims("x", 2, 3)
    a.check(0 < a.k <= min(a.x.shape[-1], _MAX_K), "k", a.k, f"1 to {min(a.x.shape[-1], _MAX_K)}")
    a.dtype("finished", torch.bool)
    a.shape("finished", tuple(a.x.shape[:-1]))


@simulates("npu_moe_gating_top_k_softmax", _check_softmax, "npu_moe_gating_top_k_softmax")
def gating_top_k_softmax(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, experts, and for each place the row that it has among k blocks of all rows."""
    weights = a.x.float().softmax(-1)
    experts = _largest(weights, a.k)
    chosen = weights.gather(-1, experts).to(a.x.dtype)
    if a.finished is not None:
        experts = experts.masked_fill(a.finished[..., None], a.x.shape[-1])
    rows = a.x.shape[:-1].numel()
    row_idx = (torch.arange(a.k)[None] * rows + torch.arange(rows)[:, None]).view(experts.shape)
    return chosen, experts.int(), row_idx.int()


def _check_gating(a: Arguments) -> None:
    a.dtype("x", *FLOATS)
    a.dims("x", 2)
    a.absent("input_ids", "tid2eid")
    experts = a.x.shape[1]
    a.check(experts <= _MAX_EXPERTS, "x", f"of {experts} experts", f"up to {_MAX_EXPERTS}")
    a.dtype("bias", a.x.dtype)
    a.shape("bias", (experts,))
    a.only("renorm", 0)
    a.only("norm_type", 0, 1)
    a.only("group_select_mode", 0, 1)
    a.check(
        a.group_count > 0 and experts % a.group_count == 0,
        "group_count",
        a.group_count,
        f"a divisor of {experts} experts",
    )
    size = experts // a.group_count
    padded = -(-size // _GROUP_STEP) * _GROUP_STEP * a.group_count
    a.check(
        a.group_count == 1 or (size > 2 and padded <= _MAX_EXPERTS),
        "group_count",
        a.group_count,
        f"groups of more than 2, which fill up {_MAX_EXPERTS} at most",
    )
    a.check(1 <= a.k_group <= a.group_count, "k_group", a.k_group, f"1 to {a.group_count}")
    a.check(1 <= a.k <= size * a.k_group, "k", a.k, f"1 to {size * a.k_group}")


@simulates("npu_moe_gating_top_k", _check_gating, "npu_moe_gating_top_k")
def gating_top_k(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The bias takes part in the choice, not in the weights. Sigmoid weights are normalised, softmax weights not."""
    norm = a.x.float().sigmoid() if a.norm_type == 1 else a.x.float().softmax(-1)
    scores = norm if a.bias is None else norm + a.bias.float()
    if a.group_count > 1:
        grouped = scores.unflatten(1, (a.group_count, -1))
        of_group = grouped.amax(-1) if a.group_select_mode == 0 else grouped.topk(2, -1).values.sum(-1)
        kept = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, _largest(of_group, a.k_group), True)
        scores = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    experts = _largest(scores, a.k)
    weights = norm.gather(1, experts)
    if a.norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + a.eps)
    return (
        (weights * a.routed_scaling_factor).to(a.x.dtype),
        experts.int(),
        norm if a.out_flag else torch.zeros_like(norm),
    )


# -- to the experts ----------------------------------------------------------------------------------------


def _check_routing(a: Arguments) -> None:
    a.dtype("x", *FLOATS, torch.int8)
    a.dims("x", 2)
    a.dtype("expert_idx", torch.int32)
    a.dims("expert_idx", 2)
    a.check(len(a.expert_idx) == len(a.x), "expert_idx", f"of {len(a.expert_idx)} rows", f"{len(a.x)}, as x")
    a.absent("offset", "x_dtype")
    a.check(0 < a.expert_num <= _MAX_ROUTED, "expert_num", a.expert_num, f"1 to {_MAX_ROUTED}")
    a.only("drop_pad_mode", 0)
    a.only("expert_tokens_num_type", COUNTS, PAIRS)
    a.only("expert_tokens_num_flag", True)
    a.only("quant_mode", *((_NO_QUANT,) if a.x.dtype == torch.int8 else (_NO_QUANT, _DYNAMIC)))
    a.only("row_idx_type", 0, 1)
    a.check(a.active_num >= -1, "active_num", a.active_num, "-1 or more")
    begin, end = _range(a)
    a.check(
        0 <= begin < end <= a.expert_num,
        "active_expert_range",
        list(a.active_expert_range),
        f"a range within 0 to {a.expert_num}",
    )
    a.dtype("scale", torch.float32)
    a.shape("scale", (len(a.x),) if a.quant_mode == _NO_QUANT else (end - begin, a.x.shape[1]))


def _range(a: Arguments) -> tuple[int, int]:
    return tuple(a.active_expert_range) if a.active_expert_range else (0, a.expert_num)


@simulates("npu_moe_init_routing_v2", _check_routing, "npu_moe_init_routing_v2")
def init_routing(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows in the order of their experts. What the document leaves undefined is NaN, or -1 among indices."""
    experts = a.expert_idx.flatten().long()
    low, high = (int(experts.min()), int(experts.max())) if len(experts) else (0, 0)
    a.check(low >= 0 and high < a.expert_num, "expert_idx", f"from {low} to {high}", f"0 to {a.expert_num - 1}")
    begin, end = _range(a)
    active = (experts >= begin) & (experts < end)
    places = experts.masked_fill(~active, _MAX_ROUTED + 1).sort(stable=True).indices[: int(active.sum())]
    if a.active_num > 0:
        places = places[: a.active_num]
    rows, taken = a.x[places // a.expert_idx.shape[1]], len(places)
    scales = torch.full((len(experts),), torch.nan)
    if a.quant_mode == _DYNAMIC:
        wide = rows.float() if a.scale is None else rows.float() * a.scale[experts[places] - begin]
        rows, scales[:taken] = quantize_rows(wide)
    elif a.scale is not None:
        scales[:taken] = a.scale[places // a.expert_idx.shape[1]]
    filler = torch.nan if rows.dtype.is_floating_point else 0
    length = min(a.active_num, len(experts)) if a.active_num > 0 else len(experts)
    expanded = torch.full((length, a.x.shape[1]), filler, dtype=rows.dtype)
    expanded[:taken] = rows
    row_idx = torch.full((len(experts),), -1, dtype=torch.int32)
    if a.row_idx_type == 0:
        row_idx[places] = torch.arange(taken, dtype=torch.int32)
    else:
        row_idx[:taken] = places.int()
    return expanded, row_idx, _tokens_of_experts(a, experts, begin, end), scales


def _tokens_of_experts(a: Arguments, experts: Tensor, begin: int, end: int) -> Tensor:
    counts = experts.bincount(minlength=a.expert_num)[begin:end]
    if a.expert_tokens_num_type == COUNTS:
        return counts
    pairs = torch.zeros(a.expert_num, 2, dtype=torch.int64)
    used = counts.nonzero().flatten()
    pairs[: len(used)] = torch.stack((used + begin, counts[used]), 1)
    return pairs


def quantize_rows(wide: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and one scale a row: the largest of a row becomes 127."""
    scale = wide.abs().amax(-1) / INT8_MAX
    return (wide / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().clamp(-128, 127).to(
        torch.int8
    ), scale


# -- and back ----------------------------------------------------------------------------------------------


def _check_unpermute(a: Arguments) -> None:
    a.dtype("permuted_tokens", *FLOATS)
    a.dims("permuted_tokens", 2)
    a.dtype("sorted_indices", torch.int32)
    a.dims("sorted_indices", 1)
    a.only("padded_mode", False)
    a.absent("restore_shape")
    a.dtype("probs", *FLOATS)
    a.dims("probs", 2)
    num = len(a.sorted_indices)
    a.check(
        a.probs is None or a.probs.numel() == num,
        "probs",
        a.probs is None or tuple(a.probs.shape),
        f"one for each of {num} sorted_indices",
    )


@simulates("npu_moe_token_unpermute", _check_unpermute, "npu_moe_token_unpermute")
def token_unpermute(a: Arguments) -> Tensor:
    """out[i] is the sum over j of permuted_tokens[sorted_indices[i * k + j]] * probs[i, j]."""
    rows = _gather_rows(a, a.permuted_tokens, "sorted_indices").float()
    if a.probs is None:
        return rows.to(a.permuted_tokens.dtype)
    weighted = rows.unflatten(0, a.probs.shape) * a.probs.float()[..., None]
    return weighted.sum(1).to(a.permuted_tokens.dtype)


def _gather_rows(a: Arguments, rows: Tensor, name: str) -> Tensor:
    indices = getattr(a, name).long()
    low, high = (int(indices.min()), int(indices.max())) if len(indices) else (0, 0)
    a.check(low >= 0 and high < max(len(rows), 1), name, f"from {low} to {high}", f"0 to {len(rows) - 1}")
    return rows[indices]


def _check_finalize(a: Arguments) -> None:
    a.dtype("expanded_permuted_rows", *FLOATS)
    a.dims("expanded_permuted_rows", 2)
    kind = a.expanded_permuted_rows.dtype
    for name in ("skip1", "skip2", "bias", "scales"):
        a.dtype(name, kind)
        a.dims(name, 2)
    a.dtype("expanded_src_to_dst_row", torch.int32)
    a.dims("expanded_src_to_dst_row", 1)
    a.dtype("export_for_source_row", torch.int32)
    a.only("drop_pad_mode", 0, 2)
    a.check(a.skip2 is not None or a.skip1 is None, "skip1", "given without skip2", "None where skip2 is None")
    a.check(
        a.bias is None or a.export_for_source_row is not None,
        "export_for_source_row",
        None,
        "the experts of bias's rows",
    )


@simulates(
    "npu_moe_finalize_routing", _check_finalize, "npu_moe_finalize_routing (drop_pad_mode 2: aclnnMoeFinalizeRoutingV2)"
)
def finalize_routing(a: Arguments) -> Tensor:
    """drop_pad_mode 0 has the k rows of a token a whole column apart, 2 beside each other."""
    rows = _gather_rows(a, a.expanded_permuted_rows, "expanded_src_to_dst_row").float()
    k = a.scales.shape[1] if a.scales is not None else a.k
    by_token = rows.unflatten(0, (k, -1)).transpose(0, 1) if a.drop_pad_mode == 0 else rows.unflatten(0, (-1, k))
    if a.bias is not None:
        by_token = by_token + a.bias.float()[a.export_for_source_row.long()]
    if a.scales is not None:
        by_token = by_token * a.scales.float()[..., None]
    total = by_token.sum(1)
    for skip in (a.skip1, a.skip2):
        total = total if skip is None else total + skip.float()
    return total.to(a.expanded_permuted_rows.dtype)
