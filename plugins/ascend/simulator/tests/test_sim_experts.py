"""Routing to experts, grouped products and the way back, against float64 written out token by token."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("anychip_npu_simulator.runtime", reason="needs torch_npu: make ascend-test", exc_type=ImportError)

import torch
import torch_npu
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    scale = max(1.0, float(wanted.abs().max()))
    assert float((got.cpu().double() - wanted.double()).abs().max()) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gating_softmax_chooses_the_largest(dtype):
    x = drawn(5, 8, dtype=dtype)
    weights, experts, rows = torch_npu.npu_moe_gating_top_k_softmax(x.npu(), k=3)
    for token, row in enumerate(x.double().tolist()):
        order = sorted(range(8), key=lambda e, row=row: -row[e])[:3]
        total = sum(math.exp(v) for v in row)
        assert experts[token].tolist() == order
        near(weights[token], torch.tensor([math.exp(row[e]) / total for e in order]), dtype)
        assert rows[token].tolist() == [token, token + 5, token + 10]
    assert weights.dtype == dtype and experts.dtype == rows.dtype == torch.int32


def test_finished_rows_go_to_no_expert():
    finished = torch.tensor([False, True, False]).npu()
    experts = torch_npu.npu_moe_gating_top_k_softmax(drawn(3, 4).npu(), finished=finished, k=2)[1].cpu()
    assert experts[1].tolist() == [4, 4] and bool((experts[[0, 2]] < 4).all())


@pytest.mark.parametrize("select", [0, 1])
@pytest.mark.parametrize("norm", [0, 1])
def test_gating_by_groups_with_a_bias(select, norm):
    x, bias = drawn(6, 16), drawn(16, seed=1) * 0.3
    weights, experts, norms = torch_npu.npu_moe_gating_top_k(
        x.npu(), 4, bias=bias.npu(), k_group=2, group_count=4, group_select_mode=select, norm_type=norm, out_flag=True,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    for token, row in enumerate(x.double().tolist()):
        total = sum(math.exp(v) for v in row)
        scores = [1 / (1 + math.exp(-v)) if norm else math.exp(v) / total for v in row]
        biased = [s + float(b) for s, b in zip(scores, bias.double(), strict=True)]
        groups = [sorted(biased[4 * g : 4 * g + 4], reverse=True) for g in range(4)]
        of_group = [g[0] if select == 0 else g[0] + g[1] for g in groups]
        kept = sorted(range(4), key=lambda g: -of_group[g])[:2]
        order = sorted((e for e in range(16) if e // 4 in kept), key=lambda e: -biased[e])[:4]
        assert experts[token].tolist() == order
        chosen = torch.tensor([scores[e] for e in order]).double()
        near(weights[token], 2.5 * (chosen / chosen.sum() if norm else chosen), torch.float32)
        near(norms[token], torch.tensor(scores), torch.float32)


@pytest.mark.parametrize("limits", [None, [1, 3]])
@pytest.mark.parametrize("quantized", [False, True])
def test_routing_there_and_back(limits, quantized):
    tokens, k, num = 7, 2, 4
    x = drawn(tokens, 16, dtype=torch.bfloat16)
    experts = torch.stack([torch.randperm(num, generator=torch.Generator().manual_seed(i))[:k] for i in range(tokens)])
    rows, places, counts, scales = torch_npu.npu_moe_init_routing_v2(
        x.npu(), experts.int().npu(), active_num=tokens * k, expert_num=num, expert_tokens_num_type=1,
        expert_tokens_num_flag=True, quant_mode=1 if quantized else -1, active_expert_range=limits or [0, num],
    )  # fmt: skip
    begin, end = limits or (0, num)
    wanted = [(i, j) for e in range(begin, end) for i in range(tokens) for j in range(k) if int(experts[i, j]) == e]
    assert counts.tolist() == [sum(int(experts[i, j]) == e for i, j in wanted) for e in range(begin, end)]
    for place, (i, j) in enumerate(wanted):
        assert int(places[i * k + j]) == place
        got = rows[place].cpu().double() * (float(scales[place]) if quantized else 1.0)
        assert float((got - x[i].double()).abs().max()) <= (float(scales[place]) / 2 + 1e-6 if quantized else 0.0)
    away = [i * k + j for i in range(tokens) for j in range(k) if not begin <= int(experts[i, j]) < end]
    assert all(int(places[p]) == -1 for p in away)
    if limits is None and not quantized:
        weights = torch.rand(tokens, k, generator=torch.Generator().manual_seed(5)).bfloat16()
        back = torch_npu.npu_moe_token_unpermute(rows, places, probs=weights.npu())
        near(back, x.double() * weights.double().sum(1, keepdim=True), torch.bfloat16)


def test_scatter_indices_are_the_inverse_of_gather_indices():
    experts = torch.tensor([[2, 0], [1, 2], [0, 1]], dtype=torch.int32).npu()
    kinds = [
        torch_npu.npu_moe_init_routing_v2(
            drawn(3, 8).npu(), experts, expert_num=3, expert_tokens_num_type=2, expert_tokens_num_flag=True,
            active_expert_range=[0, 3], row_idx_type=kind,
        )
        for kind in (0, 1)
    ]  # fmt: skip
    gather, scatter = (kind[1].tolist() for kind in kinds)
    assert [scatter[place] for place in gather] == list(range(6))
    assert kinds[0][2].tolist() == [[0, 2], [1, 2], [2, 2]]


@pytest.mark.parametrize("mode", [0, 2])
def test_finalize_routing_adds_skips_and_biases(mode):
    tokens, k = 3, 2
    rows, skip, bias = drawn(tokens * k, 8), drawn(tokens, 8, seed=1), drawn(4, 8, seed=2)
    order = torch.randperm(tokens * k, generator=torch.Generator().manual_seed(3)).int()
    scales, experts = drawn(tokens, k, seed=4), torch.tensor([[0, 3], [1, 2], [2, 0]], dtype=torch.int32)
    got = torch_npu.npu_moe_finalize_routing(
        rows.npu(), skip.npu(), skip.npu(), bias.npu(), scales.npu(), order.npu(), experts.npu(), drop_pad_mode=mode
    )
    for i in range(tokens):
        wanted = 2 * skip[i].double()
        for j in range(k):
            place = i + j * tokens if mode == 0 else i * k + j
            wanted = wanted + scales[i, j].double() * (rows[order[place]].double() + bias[experts[i, j]].double())
        near(got[i], wanted, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cumulative", [True, False])
def test_grouped_matmul_multiplies_each_group(dtype, cumulative):
    x, weight, sizes = drawn(9, 16, dtype=dtype), drawn(3, 16, 24, dtype=dtype, seed=1), [4, 0, 5]
    groups = torch.tensor([4, 4, 9] if cumulative else sizes).npu()
    (got,) = torch_npu.npu_grouped_matmul(
        [x.npu()], [weight.npu()], group_list=groups, split_item=2, group_type=0, group_list_type=int(not cumulative)
    )
    begin = 0
    for group, size in enumerate(sizes):
        near(
            got[begin : begin + size], x[begin : begin + size].double() @ weight[group].double(), dtype
        ) if size else None
        begin += size


@pytest.mark.parametrize(
    ("act", "function"), [(0, lambda v: v), (1, lambda v: v.clamp(min=0)), (5, lambda v: v / (1 + torch.exp(-v)))]
)
def test_grouped_matmul_of_int8_scales_tokens_and_columns(act, function):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (6, 32), generator=g, dtype=torch.int8)
    weight = torch.randint(-128, 128, (2, 32, 16), generator=g, dtype=torch.int8)
    scale, by_token = torch.rand(2, 16, generator=g).bfloat16() * 1e-3, torch.rand(6, generator=g) * 1e-2
    (got,) = torch_npu.npu_grouped_matmul(
        [x.npu()], [weight.npu()], scale=[scale.npu()], per_token_scale=[by_token.npu()],
        group_list=torch.tensor([2, 4]).npu(), split_item=3, group_type=0, group_list_type=1, act_type=act,
        output_dtype=torch.bfloat16,
    )  # fmt: skip
    for group, rows in enumerate((slice(0, 2), slice(2, 6))):
        wanted = x[rows].double() @ weight[group].double() * scale[group].double() * by_token[rows, None].double()
        near(got[rows], function(wanted), torch.bfloat16)


def test_grouped_matmul_widens_int8_weights_by_columns():
    x, scale = drawn(5, 32, dtype=torch.bfloat16), (drawn(2, 16, seed=1).abs() * 0.01).bfloat16()
    weight = torch.randint(-128, 128, (2, 32, 16), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    (got,) = torch_npu.npu_grouped_matmul(
        [x.npu()], [weight.npu()], antiquant_scale=[scale.npu()], group_list=torch.tensor([3, 2]).npu(), split_item=2,
        group_type=0, group_list_type=1,
    )  # fmt: skip
    for group, rows in enumerate((slice(0, 3), slice(3, 5))):
        near(got[rows], x[rows].double() @ (weight[group].double() * scale[group].double()), torch.bfloat16)


def test_rows_beyond_the_last_group_are_undefined():
    (got,) = torch_npu.npu_grouped_matmul(
        [drawn(4, 8).npu()], [drawn(1, 8, 8).npu()], group_list=torch.tensor([3]).npu(), split_item=2, group_type=0
    )
    assert bool(got[:3].isfinite().all()) and bool(got[3].isnan().all())
