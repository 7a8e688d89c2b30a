"""Calls that CANN refuses are refused here, with the argument named. Each case is a planted fault beside a call that is
right: the same call without the fault passes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("anychip_npu_simulator.runtime", reason="needs torch_npu: make ascend-test", exc_type=ImportError)

import torch
import torch_npu
from anychip_npu_simulator.errors import Refused
from torch import Tensor

HALF, BF16 = torch.float16, torch.bfloat16


def on(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(shape).to(dtype).npu()


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype).npu()


def nz(x: Tensor) -> Tensor:
    torch.npu.config.allow_internal_format = True
    return torch_npu.npu_format_cast(x, 29)


def mask(size: int = 2048, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.triu(torch.ones(size, size, dtype=dtype), 1).npu()


def attention(**changes: Any) -> Any:
    """Two rows, of 2 and 1 queries, over a cache of 4 blocks."""
    size = changes.get("block_size", 128)
    given = {
        "query": on(3, 4, 16), "key": on(4, size, 32), "value": on(4, size, 32), "atten_mask": mask(),
        "actual_seq_lengths": [2, 3], "actual_seq_lengths_kv": [2, 100], "block_table": ints(0, 1).view(2, 1),
        "num_heads": 4, "num_key_value_heads": 2, "input_layout": "TND", "sparse_mode": 3, "block_size": 128,
        "scale": 0.25,
    }  # fmt: skip
    return torch.ops.npu.npu_fused_infer_attention_score(**given | changes)


def scatter(**changes: Any) -> Any:
    given = {
        "key": on(2, 2, 16), "value": on(2, 2, 16), "key_cache": on(3, 128, 2, 16), "value_cache": on(3, 128, 2, 16),
        "slot_mapping": ints(5, 200), "cache_mode": "Norm",
    }  # fmt: skip
    return torch.ops.npu.npu_scatter_pa_kv_cache(**given | changes)


def routing(**changes: Any) -> Any:
    given = {
        "x": on(2, 8), "expert_idx": ints(0, 1, 2, 1).view(2, 2), "expert_num": 4, "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True, "active_expert_range": [0, 4],
    }  # fmt: skip
    return torch.ops.npu.npu_moe_init_routing_v2(**given | changes)


def grouped(**changes: Any) -> Any:
    given = {
        "x": [on(4, 16)], "weight": [on(2, 16, 32)], "group_list": ints(1, 4, dtype=torch.int64), "split_item": 2,
        "group_type": 0, "group_list_type": 0,
    }  # fmt: skip
    return torch.ops.npu.npu_grouped_matmul(**given | changes)


def quant_matmul(**changes: Any) -> Any:
    given = {
        "x1": on(3, 32).char(), "x2": on(32, 16).char(), "scale": torch.ones(16).npu(), "output_dtype": HALF,
        "pertoken_scale": torch.ones(3).npu(),
    }  # fmt: skip
    return torch.ops.npu.npu_quant_matmul(**given | changes)


def weight_quant(**changes: Any) -> Any:
    given = {"x": on(3, 64), "weight": on(64, 16).char(), "antiquant_scale": on(2, 16), "antiquant_group_size": 32}
    return torch.ops.npu.npu_weight_quant_batchmatmul(**given | changes)


def norm(**changes: Any) -> Any:
    return torch.ops.npu.npu_rms_norm(**{"input": on(2, 16), "gamma": on(16)} | changes)


def rotary(**changes: Any) -> Any:
    given = {"input": on(1, 2, 3, 16), "r1": on(1, 2, 1, 16), "r2": on(1, 2, 1, 16)} | changes
    return torch.ops.npu.npu_rotary_mul(**given)


def sampling(**changes: Any) -> Any:
    given = {"logits": on(2, 16), "p": on(2).abs().clamp(max=1), "k": ints(3, 4)} | changes
    return torch.ops.npu.npu_top_k_top_p(**given)


def gating(**changes: Any) -> Any:
    return torch.ops.npu.npu_moe_gating_top_k(**{"x": on(2, 8), "k": 2} | changes)


def unpermute(**changes: Any) -> Any:
    given = {"permuted_tokens": on(4, 8), "sorted_indices": ints(0, 2, 1, 3), "probs": on(2, 2)} | changes
    return torch.ops.npu.npu_moe_token_unpermute(**given)


def cast(**changes: Any) -> Any:
    torch.npu.config.allow_internal_format = True
    return torch.ops.npu.npu_format_cast(**{"input": on(16, 32), "acl_format": 29} | changes)


Fault = tuple[Callable[..., Any], dict[str, Callable[[], Any]], str]

FAULTS: dict[str, Fault] = {
    # attention
    "query in float32": (attention, {"query": lambda: on(3, 4, 16, dtype=torch.float32)}, "query"),
    "cache of another dtype": (attention, {"key": lambda: on(4, 128, 32, dtype=BF16)}, "key"),
    "block size 64": (attention, {"block_size": lambda: 64}, "block_size"),
    "block table of int64": (
        attention,
        {"block_table": lambda: ints(0, 1, dtype=torch.int64).view(2, 1)},
        "block_table",
    ),
    "block table too narrow": (attention, {"actual_seq_lengths_kv": lambda: [2, 129]}, "block_table"),
    "block that is not there": (attention, {"block_table": lambda: ints(0, 4).view(2, 1)}, "block_table"),
    "queries' lengths not cumulative": (attention, {"actual_seq_lengths": lambda: [2, 1]}, "actual_seq_lengths"),
    "queries' lengths end early": (attention, {"actual_seq_lengths": lambda: [1, 2]}, "actual_seq_lengths"),
    "no lengths of keys": (attention, {"actual_seq_lengths_kv": lambda: None}, "actual_seq_lengths_kv"),
    "more queries than keys": (attention, {"actual_seq_lengths_kv": lambda: [1, 100]}, "actual_seq_lengths_kv"),
    "mask of the batch's shape": (attention, {"atten_mask": lambda: mask(128)}, "atten_mask"),
    "mask left out": (attention, {"atten_mask": lambda: None}, "atten_mask"),
    "mask the other way round": (attention, {"atten_mask": lambda: ~mask()}, "atten_mask"),
    "mask in the query's dtype": (attention, {"atten_mask": lambda: mask(dtype=HALF)}, "atten_mask"),
    "mask with sparse mode 0": (attention, {"sparse_mode": lambda: 0}, "atten_mask"),
    "sparse mode 5": (attention, {"sparse_mode": lambda: 5}, "sparse_mode"),
    "heads before tokens": (attention, {"query": lambda: on(4, 3, 16)}, "num_heads"),
    "layout unknown": (attention, {"input_layout": lambda: "THD"}, "input_layout"),
    "heads that do not divide": (attention, {"num_key_value_heads": lambda: 3}, "num_key_value_heads"),
    "head dimension 24": (attention, {"query": lambda: on(3, 4, 24)}, "query"),
    "query not contiguous": (attention, {"query": lambda: on(4, 3, 16).transpose(0, 1)}, "query"),
    "cache with blocks of tokens by heads": (attention, {"key": lambda: on(4, 128, 2, 16)}, "key"),
    "query on the host": (attention, {"atten_mask": lambda: mask().cpu()}, "atten_mask"),
    "cache in FRACTAL_NZ": (attention, {"key": lambda: nz(on(4, 128, 32))}, "key"),
    # the cache's write
    "slot left out by -1": (scatter, {"slot_mapping": lambda: ints(5, -1)}, "slot_mapping"),
    "slot beyond the cache": (scatter, {"slot_mapping": lambda: ints(5, 384)}, "slot_mapping"),
    "slots as floats": (scatter, {"slot_mapping": lambda: on(2)}, "slot_mapping"),
    "tiles wanted, rows given": (scatter, {"cache_mode": lambda: "PA_NZ"}, "key_cache"),
    "values of another dtype": (scatter, {"value": lambda: on(2, 2, 16, dtype=BF16)}, "value"),
    # experts
    "experts of int64": (routing, {"expert_idx": lambda: ints(0, 1, 2, 1, dtype=torch.int64).view(2, 2)}, "expert_idx"),
    "expert that is not there": (routing, {"expert_idx": lambda: ints(0, 1, 2, 4).view(2, 2)}, "expert_idx"),
    "cumulative counts": (routing, {"expert_tokens_num_type": lambda: 0}, "expert_tokens_num_type"),
    "counts not wanted": (routing, {"expert_tokens_num_flag": lambda: False}, "expert_tokens_num_flag"),
    "range beyond the experts": (routing, {"active_expert_range": lambda: [2, 5]}, "active_expert_range"),
    "static quantization": (routing, {"quant_mode": lambda: 0}, "quant_mode"),
    "groups of int32": (grouped, {"group_list": lambda: ints(1, 4)}, "group_list"),
    "groups that fall": (grouped, {"group_list": lambda: ints(4, 1, dtype=torch.int64)}, "group_list"),
    "groups beyond the rows": (grouped, {"group_list": lambda: ints(1, 5, dtype=torch.int64)}, "group_list"),
    "weights as a list": (grouped, {"weight": lambda: [on(16, 32), on(16, 32)]}, "weight"),
    "results as a list": (grouped, {"split_item": lambda: 0}, "split_item"),
    "activation without quantization": (grouped, {"act_type": lambda: 5}, "act_type"),
    "experts over the groups' limit": (gating, {"group_count": lambda: 3}, "group_count"),
    "more experts than there are": (gating, {"k": lambda: 9}, "k"),
    "indices of int64": (unpermute, {"sorted_indices": lambda: ints(0, 2, 1, 3, dtype=torch.int64)}, "sorted_indices"),
    "indices of -1": (unpermute, {"sorted_indices": lambda: ints(0, -1, 1, 3)}, "sorted_indices"),
    # products
    "activations in float": (quant_matmul, {"x1": lambda: on(3, 32)}, "x1"),
    "weight of other rows": (quant_matmul, {"x2": lambda: on(16, 32).char()}, "x2"),
    "scale of the rows": (quant_matmul, {"scale": lambda: torch.ones(3).npu()}, "scale"),
    "scales of tokens with an int32 result": (quant_matmul, {"output_dtype": lambda: torch.int32}, "pertoken_scale"),
    "groups of 48": (weight_quant, {"antiquant_group_size": lambda: 48}, "antiquant_group_size"),
    "scale of another dtype": (weight_quant, {"antiquant_scale": lambda: on(2, 16, dtype=BF16)}, "antiquant_scale"),
    "FRACTAL_NZ outside of torchair": (weight_quant, {"weight": lambda: nz(on(64, 16).char())}, "weight"),
    # the rest
    "gamma of another dtype": (norm, {"gamma": lambda: on(16, dtype=BF16)}, "gamma"),
    "gamma of another size": (norm, {"gamma": lambda: on(8)}, "gamma"),
    "input in FRACTAL_NZ": (norm, {"input": lambda: nz(on(16, 16))}, "input"),
    "angles of three dimensions": (rotary, {"r1": lambda: on(2, 1, 16)}, "r1"),
    "angles of half the heads' size": (rotary, {"r1": lambda: on(1, 2, 1, 8)}, "r1"),
    "rotation unknown": (rotary, {"rotary_mode": lambda: "quarter"}, "rotary_mode"),
    "k of int64": (sampling, {"k": lambda: ints(3, 4, dtype=torch.int64)}, "k"),
    "k of 0": (sampling, {"k": lambda: ints(3, 0)}, "k"),
    "p in float32 beside half": (sampling, {"p": lambda: torch.ones(2).npu()}, "p"),
    "float32 weights in FRACTAL_NZ": (cast, {"input": lambda: on(16, 32, dtype=torch.float32)}, "input"),
    "a layout of convolutions": (cast, {"acl_format": lambda: 3}, "acl_format"),
}


@pytest.mark.parametrize("call", sorted({fault[0] for fault in FAULTS.values()}, key=lambda f: f.__name__))
def test_the_call_without_the_fault_passes(call):
    call()


@pytest.mark.parametrize("fault", FAULTS)
def test_misuse_is_refused_with_the_argument_named(fault):
    call, changes, argument = FAULTS[fault]
    with pytest.raises(Refused) as refused:
        call(**{name: make() for name, make in changes.items()})
    assert refused.value.argument == argument
    assert refused.value.allowed and refused.value.op.startswith("npu::")


def test_lengths_on_the_device_are_refused():
    """Torch would read them one by one, and wait each time."""
    with pytest.raises(RuntimeError, match="actual_seq_lengths_kv is a tensor of the device"):
        attention(actual_seq_lengths_kv=ints(2, 100))


def test_unknown_keywords_are_refused_by_the_vendors_schema():
    with pytest.raises(RuntimeError, match="eps"):
        norm(eps=1e-6)


def test_ops_of_a_generation_are_refused_on_another(monkeypatch):
    monkeypatch.setenv("NPU_SIMULATOR_SOC", "Ascend310P3")
    with pytest.raises(Refused) as refused:
        attention()
    assert refused.value.argument == "generation" and "910B" in refused.value.allowed
    with pytest.raises(Refused) as refused:
        quant_matmul(pertoken_scale=None, output_dtype=HALF)
    assert refused.value.argument == "x2"


def test_a_cast_with_the_vendors_switch_off_is_refused():
    x = on(16, 32)
    torch.npu.config.allow_internal_format = False
    with pytest.raises(Refused) as refused:
        torch_npu.npu_format_cast(x, 29)
    assert "allow_internal_format" in refused.value.allowed


def test_ops_that_are_not_simulated_say_so():
    with pytest.raises(Refused, match="not simulated"):
        torch_npu.npu_fast_gelu(on(4))
