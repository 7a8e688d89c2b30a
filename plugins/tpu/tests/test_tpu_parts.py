"""What of the plugin needs no runtime: which one is chosen, shapes, edits of blocks, arrays on their way, draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from host_runtime import HostRuntime
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.ops.reference.sampling import truncate
from anychip.plugin_api import MoESpec, QuantScheme, ShapeKey, StepLimits, Unsupported, forward_features
from anychip.plugin_api.step_layout import array_views, blank_sampling_inputs, blank_step_inputs
from anychip_tpu.arrays import device_views, host_arrays
from anychip_tpu.edits import EDITS_AT_ONCE, edited, turns
from anychip_tpu.moe import make_moe
from anychip_tpu.ops import tanh
from anychip_tpu.runtimes.choice import chosen_runtime, installed_runtimes, missing_runtime
from anychip_tpu.sampling import truncated
from anychip_tpu.shapes import BucketedShapes

XLA = {"torch": "2.9.0+cu128", "torch_xla": "2.9.0"}
TORCHTPU = {"torch": "2.13.0", "torch_tpu": "0.2.0"}


# -- the runtime --------------------------------------------------------------------------------------------


def test_auto_takes_what_fits_the_installed_torch():
    assert chosen_runtime("auto", XLA) == ("xla", "")
    assert chosen_runtime("auto", TORCHTPU) == ("torchtpu", "")
    assert installed_runtimes({**TORCHTPU, "torch_xla": "2.9.0"}) == ["torchtpu"]


def test_a_runtime_for_another_torch_is_refused_with_both_versions_and_the_environment_to_make():
    reason, remedy = missing_runtime({"torch": "2.13.0", "torch_xla": "2.9.0"})
    assert "torch_xla 2.9.0" in reason and "torch 2.13.0" in reason
    assert "environment of its own" in remedy and "anychip-tpu[xla]" in remedy


def test_without_a_runtime_both_are_named():
    reason, remedy = missing_runtime({"torch": "2.13.0"})
    assert "neither" in reason
    assert "anychip-tpu[xla]" in remedy and "anychip-tpu[torchtpu]" in remedy


@pytest.mark.parametrize("asked", ["torchtpu", "jax"])
def test_a_runtime_that_is_not_there_is_refused(asked):
    name, problem = chosen_runtime(asked, XLA)
    assert name is None
    assert asked in problem


# -- shapes -------------------------------------------------------------------------------------------------


@st.composite
def limits_and_steps(draw: st.DrawFn) -> tuple[StepLimits, list[int], int]:
    drafts = draw(st.sampled_from([0, 3]))
    limits = StepLimits(
        max_num_tokens=draw(st.integers(1, 3000)),
        max_num_reqs=draw(st.integers(1, 300)),
        max_model_len=4096,
        max_slots=300,
        max_drafts=drafts,
        max_pages=(draw(st.integers(1, 600)),),
    )
    rows = draw(st.integers(1, min(limits.max_num_reqs, limits.max_num_tokens)))
    left = limits.max_num_tokens - rows
    extra = draw(st.lists(st.integers(0, max(left, 0) // rows), min_size=rows, max_size=rows))
    return limits, [1 + more for more in extra], draw(st.integers(1, max(limits.max_pages)))


@settings(max_examples=200)
@given(limits_and_steps(), st.booleans())
def test_every_step_within_the_limits_has_a_shape_that_is_compiled(given_step, bucket_pages):
    limits, widths, pages = given_step
    shapes = BucketedShapes(limits, bucket_pages=bucket_pages)
    for features in forward_features(limits):
        key = shapes.bucket(
            num_tokens=sum(widths),
            num_reqs=len(widths),
            num_samples=sum(min(width, 1 + limits.max_drafts) for width in widths)
            if limits.max_drafts
            else len(widths),
            max_query_len=max(widths),
            num_pages=pages,
            features=features,
        )
        assert key in {*shapes.keys(), *shapes.with_features(limits)}
        assert sum(widths) <= key.num_tokens and len(widths) <= key.num_reqs and pages <= key.num_pages


def test_a_larger_step_is_refused_with_the_numbers():
    limits = StepLimits(max_num_tokens=64, max_num_reqs=8, max_model_len=256, max_slots=8, max_pages=(16,))
    with pytest.raises(Unsupported, match="65 tokens in 8 rows.*64 tokens, 8 rows"):
        BucketedShapes(limits, bucket_pages=True).bucket(
            num_tokens=65, num_reqs=8, num_samples=8, max_query_len=58, num_pages=16, features=()
        )


# -- edits of blocks ----------------------------------------------------------------------------------------

BLOCKS = st.integers(1, 30)


@given(st.lists(st.tuples(BLOCKS, BLOCKS), max_size=60), st.lists(BLOCKS, max_size=40, unique=True))
def test_turns_of_edits_equal_edits_one_by_one(copies, zeros):
    cache = torch.arange(1.0, 32.0).unsqueeze(-1).repeat(1, 2)
    expected = cache.clone()
    for source, target in copies:
        expected[target] = expected[source]
    expected[zeros] = 0
    for targets, sources, cleared in turns(copies, zeros):
        assert len(targets) == len(sources) == len(cleared) == EDITS_AT_ONCE
        real = [target for target in targets if target]
        assert len(real) == len({*real}), "a run writes a block once"
        cache = edited(cache, *map(torch.tensor, (targets, sources, cleared)))
    assert torch.equal(cache[1:], expected[1:])


# -- arrays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [(), ("scores",)])
def test_a_steps_arrays_come_back_by_name(features):
    key = ShapeKey(num_tokens=16, num_reqs=8, num_samples=8, max_query_len=16, num_pages=4, features=features)
    step = blank_step_inputs(key, num_groups=2, slot_dtype="int32", max_slots=9)
    for sections, arena in (
        (step.sections, step.arena),
        (blank_sampling_inputs(key, 100).sections, blank_sampling_inputs(key, 100).arena),
    ):
        views = array_views(arena, sections)
        for number, view in enumerate(views.values()):
            view[...] = np.arange(view.size).reshape(view.shape) + 100 * number
        found = device_views(host_arrays(arena, sections), sections)
        arena[...] = 0  # core writes the next step there
        assert {*found} == {*views}
        for number, (name, tensor) in enumerate(found.items()):
            assert torch.equal(tensor.flatten().long(), torch.arange(tensor.numel()) + 100 * number), name


# -- experts ------------------------------------------------------------------------------------------------


def test_experts_with_static_activation_scales_are_refused_by_name():
    scheme = QuantScheme(values="fp8_e4m3", scales="channel", activations="static")
    spec = MoESpec(num_experts=4, top_k=2, hidden_size=16, intermediate_size=16, dtype="float32", scheme=scheme)
    with pytest.raises(Unsupported, match="experts in fp8 with static scales"):
        make_moe(spec, None, HostRuntime())


# -- numbers ------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.integers(2, 300), st.booleans())
def test_truncation_without_a_sort_equals_the_sorted_one(seed, vocab_size, with_ties):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, vocab_size, generator=generator) * 4 * torch.rand((), generator=generator)
    if with_ties:
        logits = (2 * logits).round() / 2
    probs = torch.softmax(logits.double(), dim=-1)
    limits = {
        "top_k": torch.randint(0, vocab_size + 3, (4,), generator=generator).int(),
        "top_p": (1.3 * torch.rand(4, generator=generator)).clamp(max=1),
        "min_p": 0.3 * torch.rand(4, generator=generator) * (torch.rand(4, generator=generator) > 0.5),
    }
    assert torch.equal(truncated(probs, **limits) > 0, truncate(probs, **limits) > 0)


def test_tanh_is_within_three_units_in_the_last_place():
    x = torch.cat([torch.randn(10_000) * width for width in (0.01, 0.1, 0.5, 1.0, 4.0)])
    exact = torch.tanh(x.double())
    unit = 2.0 ** (torch.floor(torch.log2(exact.abs())) - 23)
    assert ((tanh(x).double() - exact).abs() / unit).max() < 3
