"""Reference ops against plain definitions, and the table that dispatches to overrides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.config import EngineConfig
from anychip.errors import InvalidOverride, Unsupported
from anychip.launch.inspect import inspect_ops
from anychip.ops.reference import REFERENCE_OPS
from anychip.ops.reference.functional import embedding, rms_norm, rotary
from anychip.ops.reference.philox import philox, uniform
from anychip.ops.reference.sampling import apply_token_masks, logprobs, sample, truncate
from anychip.ops.table import resolve_ops
from anychip.plugin_api import QKNorm, Rope, op_override
from anychip.registry.devices import choose_device
from anychip.registry.plugins import load_plugins

# -- randomness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of the Random123 distribution
        ([0, 0, 0, 0], [0, 0], ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"],
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    tensors = [torch.tensor([word], dtype=torch.int64) for word in (*counter, *key)]
    assert [f"{int(word):08x}" for word in philox(tuple(tensors[:4]), tuple(tensors[4:]))] == words


def test_a_draw_depends_on_nobody_else_in_the_batch():
    def draw(rows):
        columns = [torch.tensor(column, dtype=torch.int32) for column in zip(*rows, strict=True)]
        return uniform(*columns, purpose=0).tolist()

    rows = [(1, 2, 0, 5), (1, 2, 1, 5), (7, 0, 0, 9)]
    assert draw(rows) == [draw([row])[0] for row in rows]
    assert len(set(draw(rows))) == 3


# -- sampling ---------------------------------------------------------------------------------------------


def plain_truncate(probs, top_k, top_p, min_p):
    """Row by row, as the specification reads."""
    result = np.zeros_like(probs)
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    ranked = [i for rank, i in enumerate(order) if not top_k or rank < top_k]
    total, running = sum(probs[i] for i in ranked), 0.0
    for i in ranked:
        if running >= top_p * total:
            break
        running += probs[i]
        if probs[i] >= min_p * probs[order[0]]:
            result[i] = probs[i]
    return result


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.integers(0, 6), min_size=2, max_size=12).filter(any),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_truncation_equals_its_specification_ties_included(weights, top_k, top_p, min_p):
    # Powers of two keep the sums exact, so that a tie is a tie in every order of summation.
    probs = np.array([2.0**w if w else 0.0 for w in weights]) / 1024
    actual = truncate(
        torch.from_numpy(probs).unsqueeze(0),
        top_k=torch.tensor([top_k]),
        top_p=torch.tensor([top_p], dtype=torch.float64),
        min_p=torch.tensor([min_p], dtype=torch.float64),
    )
    np.testing.assert_array_equal(actual[0].numpy(), plain_truncate(probs, top_k, top_p, min_p))


def draw_many(logits, count=4000, **params):
    rows = torch.tensor([logits]).repeat(count, 1)
    values = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "seed_low": 3, "seed_high": 0} | params
    columns = {
        name: torch.full((count,), value, dtype=torch.float32 if isinstance(value, float) else torch.int32)
        for name, value in values.items()
    }
    position = torch.arange(count, dtype=torch.int32)
    return sample(logits=rows, sample_index=torch.zeros(count, dtype=torch.int32), position=position, **columns)


def test_draws_follow_the_distribution():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = torch.bincount(draw_many(probs.log().tolist()).long(), minlength=4) / 4000
    # Four standard deviations of a share of one half over 4,000 draws.
    assert (drawn - probs).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_temperature_zero_is_greedy_beside_rows_that_are_not():
    logits = [0.0, 2.0, 1.0]
    assert set(draw_many(logits, 50, temperature=0.0).tolist()) == {1}
    assert len(set(draw_many(logits, 200, temperature=1.0).tolist())) == 3


def test_a_masked_token_is_never_drawn():
    logits = torch.zeros(1, 40)
    masks = np.full((1, 2), 0, dtype=np.uint32)
    masks[0, 1] = 1 << 3  # token 35 alone
    masked = apply_token_masks(logits=logits, masks=torch.from_numpy(masks.view(np.int32)))
    assert torch.isfinite(masked[0]).nonzero().tolist() == [[35]]
    assert set(draw_many(masked[0].tolist(), 50).tolist()) == {35}


def test_bit_31_of_a_mask_is_a_token_like_the_others():
    masks = torch.tensor([[-(2**31)]], dtype=torch.int32)
    masked = apply_token_masks(logits=torch.zeros(1, 32), masks=masks)
    assert torch.isfinite(masked[0]).nonzero().tolist() == [[31]]


def test_logprobs_are_those_of_the_whole_distribution():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    chosen, top_ids, top = logprobs(logits=logits, token_ids=torch.tensor([2]), num_top=2)
    expected = torch.log_softmax(logits[0], dim=-1)
    assert chosen.tolist() == pytest.approx([expected[2].item()])
    assert top_ids.tolist() == [[1, 2]]
    assert top.tolist()[0] == pytest.approx([expected[1].item(), expected[2].item()])


# -- single ops -------------------------------------------------------------------------------------------


def test_embedding_of_an_id_held_elsewhere_is_zero():
    weight = torch.arange(6.0).view(3, 2)
    result = embedding(ids=torch.tensor([4, 5, 9]), weight=weight, first=4)
    assert result.tolist() == [[0.0, 1.0], [2.0, 3.0], [0.0, 0.0]]


def test_rms_norm_with_unit_offset_adds_one_to_the_weight():
    x, weight = torch.randn(3, 8), torch.randn(8)
    offset = rms_norm(x=x, weight=weight, eps=1e-6, unit_offset=True)
    torch.testing.assert_close(offset, rms_norm(x=x, weight=weight + 1, eps=1e-6))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_rotary_is_a_rotation_of_complex_pairs(interleaved, rotary_dim):
    angles = torch.outer(torch.arange(10.0), 1 / 100 ** (torch.arange(0, rotary_dim, 2) / rotary_dim))
    rope = Rope(cos=angles.cos(), sin=angles.sin(), rotary_dim=rotary_dim, interleaved=interleaved)
    x, positions = torch.randn(4, 2, 8), torch.tensor([0, 3, 9, 1])
    half = rotary_dim // 2
    first = slice(0, rotary_dim, 2) if interleaved else slice(0, half)
    second = slice(1, rotary_dim, 2) if interleaved else slice(half, rotary_dim)
    turned = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones(()), angles[positions]).unsqueeze(1)
    expected = x.clone()
    expected[..., first], expected[..., second] = turned.real, turned.imag
    torch.testing.assert_close(rotary(x=x, positions=positions, rope=rope), expected)


# -- the table --------------------------------------------------------------------------------------------


def test_an_override_is_called_and_named():
    @op_override("softcap", version=1)
    def fast_softcap(*, x, cap):
        return x

    table = resolve_ops("acme", {"softcap": fast_softcap})
    assert table.ops.softcap(x=3, cap=1) == 3
    assert "fast_softcap" in table.served_by["softcap"]
    assert table.ops.rms_norm is REFERENCE_OPS["rms_norm"]


def test_a_composite_op_without_an_override_is_made_of_those_that_have_one():
    @op_override("rms_norm", version=1)
    def loud_norm(*, x, weight, eps, unit_offset=False):
        return x * 100

    ops = resolve_ops("acme", {"rms_norm": loud_norm}).ops
    x, weight = torch.ones(2, 4), torch.ones(4)
    normed, total = ops.residual_norm_quant(x=x, residual=x, weight=weight, eps=0.0)
    assert normed.tolist() == [[200.0] * 4] * 2 and total.tolist() == [[2.0] * 4] * 2
    norm = QKNorm(q_weight=weight, k_weight=weight, eps=0.0)
    q, _ = ops.qkv_norm_rope(q=x, k=None, positions=None, rope=None, qk_norm=norm)
    assert q.tolist() == [[100.0] * 4] * 2


def test_an_override_that_lacks_a_later_argument_is_passed_over_and_noted():
    @op_override("rms_norm", version=1)
    def old_norm(*, x, weight, eps):
        return x

    table = resolve_ops("acme", {"rms_norm": old_norm})
    assert table.ops.rms_norm is REFERENCE_OPS["rms_norm"]
    assert "does not know unit_offset" in table.notes[0]


def misnamed(*, x, cap):
    return x


@op_override("softcap", version=1)
def lacks_an_argument(*, x):
    return x


@op_override("softcap", version=1)
def wants_more(*, x, cap, alpha):
    return x


@op_override("softcap", version=1)
def positional(x, cap, /):
    return x


@op_override("softcap", version=9)
def too_new(*, x, cap):
    return x


@pytest.mark.parametrize(
    ("name", "override", "expected"),
    [
        ("softcup", lacks_an_argument, "no such op"),
        ("softcap", misnamed, "mark it with @op_override"),
        ("softcap", lacks_an_argument, "lacks the argument 'cap'"),
        ("softcap", wants_more, "requires 'alpha'"),
        ("softcap", positional, "positional-only"),
        ("softcap", too_new, "written for version 9"),
    ],
)
def test_an_override_with_a_wrong_name_version_or_signature_is_refused(name, override, expected):
    with pytest.raises(InvalidOverride, match=expected):
        resolve_ops("acme", {name: override})


def test_require_native_names_every_reference_op():
    with pytest.raises(Unsupported, match="no override of rms_norm"):
        resolve_ops("acme", {}, require_native=True)


def test_a_compiled_step_serves_every_op_that_has_no_override():
    table = resolve_ops("acme", {}, require_native=True, compiled_steps=True)
    assert set(table.served_by.values()) == {"the step program"}
    assert table.reference_ops == ()


@pytest.mark.parametrize("device", ["fake-static", "fake-spmd"])
def test_the_hot_path_of_a_step_seam_device_is_its_program(device):
    report = inspect_ops(choose_device(EngineConfig(device=device), load_plugins()))
    assert report.served_by["rms_norm"] == "the step program"
    assert not report.reference_ops
