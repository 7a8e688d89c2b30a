"""The tables that choose kernels and say what errors mean: no device, no torch_npu."""

from __future__ import annotations

import dataclasses

import pytest

from anychip.plugin_api import NAMED, AttentionSpec, GraphLevel, LinearPart, LinearSpec, MoESpec, StepLimits
from anychip_ascend.attention_choice import choose_attention
from anychip_ascend.faults import CODES, explained, meaning_of
from anychip_ascend.generations import G310P, G910B, G910C, G950, GENERATIONS, generation_of, unknown_chip
from anychip_ascend.linear_choice import choose_linear, fits_nz
from anychip_ascend.moe_choice import choose_gating, choose_moe
from anychip_ascend.shapes import AscendShapes, thinned
from anychip_ascend.streams import StreamBudget

GQA = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16", kv_dtype="bfloat16")


@pytest.mark.parametrize(
    ("chip", "generation"),
    [("Ascend310P3", G310P), ("310P3", G310P), ("Ascend910B4-1", G910B), ("910B3", G910B), ("Ascend910_9392", G910C),
     ("Ascend910", G910C), ("Ascend 910B2C", G910B), ("Ascend950PR_9589", G950), ("Ascend910_9589", G950),
     ("Ascend310B1", None), ("Ascend910A", None), ("Ascend910PremiumA", None), ("", None)],
)  # fmt: skip
def test_a_chip_belongs_to_one_generation_or_to_none(chip, generation):
    assert generation_of(chip) is generation


def test_an_unknown_chip_is_told_what_is_known():
    assert all(generation.name in unknown_chip("Ascend310B1") for generation in GENERATIONS)


# -- attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_grouped_queries_take_the_fused_op_in_both_dtypes(dim, dtype):
    spec = dataclasses.replace(GQA, head_dim=dim, dtype=dtype, kv_dtype=dtype)
    assert choose_attention(spec, G910B).op == "npu_fused_infer_attention_score"


@pytest.mark.parametrize(
    ("changes", "op"),
    [
        ({"window": 4096}, "npu_fused_infer_attention_score"),
        ({"num_kv_heads": 8}, "npu_fused_infer_attention_score"),
        ({"sinks": True}, "npu_fused_infer_attention_score_v2"),
        ({"sinks": True, "window": 128}, "npu_fused_infer_attention_score_v2"),
    ],
)
def test_windows_sinks_and_ungrouped_heads_take_it_where_its_documents_say(changes, op):
    spec = dataclasses.replace(GQA, **changes)
    assert choose_attention(spec, G910C).op == op
    for narrower in ({"head_dim": 64}, {"dtype": "float16", "kv_dtype": "float16"}):
        choice = choose_attention(dataclasses.replace(spec, **narrower), G910C)
        assert choice.op == "reference" and "bfloat16 of head_dim 128" in choice.why


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"softcap": 50.0}, "soft cap"),
        ({"alibi": True}, "position bias"),
        ({"lse": True}, "log-sum-exp"),
        ({"dtype": "float32", "kv_dtype": "float32"}, "float16 and bfloat16"),
        ({"kv_dtype": "float16"}, "over float16"),
        ({"head_dim": 40}, "multiple of 16"),
        ({"head_dim": 288}, "head_dim 128"),
        ({"num_heads": 130, "num_kv_heads": 2}, "64 at most"),
        ({"num_heads": 1024, "num_kv_heads": 512, "head_dim": 256}, "65535 values"),
    ],
)
def test_what_the_fused_op_lacks_runs_on_the_reference_with_the_reason(changes, said):
    choice = choose_attention(dataclasses.replace(GQA, **changes), G910B)
    assert choice.op == "reference" and said in choice.why


def test_a_generation_without_the_op_is_named():
    assert choose_attention(GQA, G310P).why == "310P has no npu_fused_infer_attention_score"
    assert all(G310P.lacks.values()), "each lack says what serves instead"


# -- products -------------------------------------------------------------------------------------------------


def linear(in_features=256, out_features=128, dtype="bfloat16", scheme=None) -> LinearSpec:
    part = LinearPart(name="p", offset=0, rows=out_features)
    return LinearSpec(
        in_features=in_features, out_features=out_features, parts=(part,), dtype=dtype, scheme=scheme
    )  # fmt: skip


def test_weights_lie_in_blocks_where_these_are_filled():
    assert choose_linear(linear(), G910B, nz=True).nz
    assert not choose_linear(linear(), G910B, nz=False).nz
    assert not choose_linear(linear(out_features=100), G910B, nz=True).nz
    assert not choose_linear(linear(dtype="float32"), G910B, nz=True).nz
    assert fits_nz("int8", 16, 32) and not fits_nz("int8", 16, 16)


@pytest.mark.parametrize(
    ("name", "changes", "dtype", "op"),
    [
        ("int8-w8a8", {}, "bfloat16", "npu_quant_matmul"),
        ("int8-w8a8", {}, "float32", "reference"),
        ("int8-w8a8", {"scales": "group", "group_size": 64}, "bfloat16", "reference"),
        ("int8", {}, "float16", "npu_weight_quant_batchmatmul"),
        ("int8", {}, "float32", "widened"),
        ("int4", {"group_size": 64}, "bfloat16", "npu_weight_quant_batchmatmul"),
        ("int4", {"group_size": 64, "zero_points": "int"}, "bfloat16", "npu_weight_quant_batchmatmul"),
        ("int4", {"group_size": 16}, "bfloat16", "widened"),
        ("int4", {"group_size": 256}, "bfloat16", "widened"),
        ("int4-float-zeros", {}, "bfloat16", "widened"),
        ("mxfp4", {}, "bfloat16", "widened"),
        ("codebook4", {}, "bfloat16", "widened"),
        ("fp8", {}, "bfloat16", "reference"),
    ],
)
def test_a_scheme_takes_the_product_that_has_it(name, changes, dtype, op):
    scheme = dataclasses.replace(NAMED[name], **changes)
    choice = choose_linear(linear(dtype=dtype, scheme=scheme), G910B, nz=True)
    assert choice.op == op and choice.why


def test_310p_has_int8_by_channel_under_float16_only():
    assert choose_linear(linear(dtype="float16", scheme=NAMED["int8"]), G310P, nz=True).op.startswith("npu_weight")
    for dtype, name in (("float16", "int4"), ("float32", "int8")):
        assert choose_linear(linear(dtype=dtype, scheme=NAMED[name]), G310P, nz=True).op == "widened"
    assert "310P" in choose_linear(linear(scheme=NAMED["int8-w8a8"]), G310P, nz=True).why


MOE = MoESpec(num_experts=64, top_k=6, hidden_size=256, intermediate_size=128, dtype="bfloat16")


def test_experts_take_the_grouped_product_where_it_has_them():
    assert choose_moe(MOE, G910B).op == "npu_grouped_matmul"
    assert choose_moe(MOE, G310P).op == "reference"
    assert choose_moe(dataclasses.replace(MOE, num_experts=2000), G910B).op == "reference"
    assert choose_moe(dataclasses.replace(MOE, scheme=NAMED["int4"]), G910B).op == "widened"
    int8 = dataclasses.replace(MOE, scheme=NAMED["int8-w8a8"])
    assert choose_moe(int8, G910B).op == "npu_grouped_matmul"
    for changes in ({"bias": True}, {"dtype": "float32"}, {"scheme": NAMED["fp8"]}):
        assert choose_moe(dataclasses.replace(int8, **changes), G910B).op == "reference"


@pytest.mark.parametrize(
    ("changes", "gating"),
    [
        ({}, "softmax"),
        ({"router_bias": True}, "general"),
        ({"scoring": "sigmoid"}, "general"),
        ({"scoring": "sigmoid", "renormalize": False}, "reference"),
        ({"num_groups": 8, "top_groups": 4}, "general"),
        ({"num_groups": 32, "top_groups": 8}, "reference"),
        ({"num_groups": 16, "top_groups": 1}, "reference"),
    ],
)
def test_routing_takes_the_gating_op_that_means_the_same(changes, gating):
    assert choose_gating(dataclasses.replace(MOE, **changes)) == gating


# -- graphs ---------------------------------------------------------------------------------------------------

LIMITS = StepLimits(max_num_tokens=512, max_num_reqs=200, max_model_len=1024, max_slots=200, max_pages=(8,))


def rows_of(policy: AscendShapes) -> list[int]:
    """Of the steps that have graphs."""
    return [key.num_reqs for key in policy.keys()]  # noqa: SIM118 - a policy is no mapping


def test_captured_sizes_are_as_many_as_streams_allow():
    free = AscendShapes(LIMITS, GraphLevel.FULL, StreamBudget(lambda: 1800, 1800))
    few = AscendShapes(LIMITS, GraphLevel.FULL, StreamBudget(lambda: 64 + 5, 1800))
    none = AscendShapes(LIMITS, GraphLevel.FULL, StreamBudget(lambda: 60, 1800))
    rows = [rows_of(policy) for policy in (free, few, none)]
    assert rows[0][0] == 1 and rows[0][-1] == 200 and len(rows[0]) == 14
    assert len(rows[1]) == 5 and rows[1][0] == 1 and rows[1][-1] == 200, "spread from the smallest to the largest"
    assert rows[2] == [] and not none.pieces()


def test_a_generation_may_have_few_graphs_whatever_streams_are_left():
    policy = AscendShapes(LIMITS, GraphLevel.FULL, StreamBudget(lambda: 1800, 1800, G950.most_graphs))
    assert rows_of(policy) == [1, 16, 96, 200]


def test_steps_find_the_smallest_shape_that_holds_them():
    policy = AscendShapes(LIMITS, GraphLevel.FULL, StreamBudget(lambda: 1800, 1800))
    step = {"num_samples": 3, "num_pages": 8, "features": ()}
    assert policy.bucket(num_tokens=3, num_reqs=3, max_query_len=1, **step).num_tokens == 4
    assert policy.bucket(num_tokens=20, num_reqs=3, max_query_len=9, **step).num_tokens == 64
    assert rows_of(AscendShapes(LIMITS, GraphLevel.PIECEWISE, StreamBudget(lambda: 1800, 1800))) == []
    off = AscendShapes(LIMITS, GraphLevel.NONE, StreamBudget(lambda: 1800, 1800))
    assert off.bucket(num_tokens=20, num_reqs=3, max_query_len=9, **step).num_tokens == 20


@pytest.mark.parametrize(("most", "kept"), [(0, []), (1, [8]), (2, [1, 8]), (3, [1, 4, 8]), (9, [1, 2, 4, 6, 8])])
def test_thinned_sizes_keep_the_largest(most, kept):
    assert thinned([1, 2, 4, 6, 8], most) == kept


def test_what_a_capture_took_is_learnt_from_the_runtime():
    left = [100]
    budget = StreamBudget(lambda: left[0], 1800)
    assert not budget.short_of(36) and "37 graphs take 37" in budget.short_of(37)
    with budget.spent(2):
        left[0] = 92  # four streams to a graph
    assert budget.num_sizes() == 7 and "8 graphs take 32 streams" in budget.short_of(8)


def test_a_runtime_that_does_not_say_is_counted_for():
    budget = StreamBudget(lambda: None, 70)
    with budget.spent(5):
        pass
    assert budget.num_sizes() == 1


# -- faults ---------------------------------------------------------------------------------------------------

GIB = 2**30


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 60.96 GiB total capacity)", "out_of_memory"),
        ("call aclnnAdd failed, error code is 207001", "out_of_memory"),
        ("NPU function error: c10_npu::acl::AclmdlRICaptureBegin(s, m), error code is 207008", "out_of_streams"),
        ("[Error]: Stream resources are insufficient.", "out_of_streams"),
        ("NPU function error: aclrtSetDevice, error code is 107002", "configuration"),
        ("NPU error, error code is 507054. HBM MULTI BIT ECC ERROR.", "memory_error"),
        ("UCE ERROR. time us= 12", "memory_error"),
        ("HCCL function error: HcclAllReduce, error code is 4", "peer_lost"),
        ("EI0006: Getting socket times out. Reason: Remote Rank did not send", "peer_lost"),
        ("EI0002: The wait execution of the Notify register times out", "peer_lost"),
        ("HCCS LINK ERROR", "peer_lost"),
        ("call aclnnFusedInferAttentionScoreV3 failed, detail: error code is 561002", "refused"),
        ("The Inner error. NPU error, error code is 507014", "timeout"),
        ("NPU function error: aclrtSynchronizeStream, error code is 507015", "illegal_access"),
        ("NPU function error: aclrtSynchronizeDevice, error code is 507899", "device_lost"),
        ("stream is captured, error code is 107030", "graph"),
        ("FORCE STOP.", "stopped"),
    ],
)
def test_the_vendors_messages_become_faults_with_a_remedy(message, kind):
    fault = explained(message, "npu:0")
    assert fault is not None and fault.kind == kind and fault.remedy
    assert str(fault).startswith("npu:0 ") and fault.fatal == (kind != "out_of_memory")


def test_out_of_memory_says_what_was_asked_and_what_is_free():
    fault = explained("NPU out of memory. Tried to allocate 2.00 GiB (NPU 0;", "npu:0", free=GIB, total=64 * GIB)
    assert fault is not None
    assert "2.00 GiB asked, 1.00 of 64.00 GiB free" in str(fault) and "--memory-fraction" in str(fault)


@pytest.mark.parametrize("message", ["list index out of range", "error code is 999999", "a stranger's 207008"])
def test_what_is_not_the_vendors_is_left_alone(message):
    assert meaning_of(message) is None and explained(message, "npu:0") is None


def test_every_code_has_a_kind_and_a_remedy():
    assert all(meaning.kind and meaning.what and meaning.remedy for meaning in CODES.values())
    assert {207001, 207008, 107002, 507054} <= CODES.keys()
