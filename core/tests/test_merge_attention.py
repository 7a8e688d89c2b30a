"""Attention in parts: merging them gives what attention over all keys gives, whatever a part has seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anychip.ops.reference import attend_row, attend_row_with_lse, merge_attention
from anychip.plugin_api import AttentionSpec, Capabilities, PartialAttention
from anychip.plugin_api.refusals import undeclared

HEADS, DIM, KEYS = 4, 8, 12
SPEC = AttentionSpec(num_heads=HEADS, num_kv_heads=2, head_dim=DIM, dtype="float32", kv_dtype="float32", lse=True)


def inputs(magnitude: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """One query, and its keys and values."""
    drawn = torch.Generator().manual_seed(1)
    q = magnitude * torch.randn(1, HEADS, DIM, generator=drawn)
    k, v = torch.randn(2, KEYS, 2, DIM, generator=drawn)
    return q, k, v


def part(first: int, last: int, *, magnitude: float = 1.0, sinks: Tensor | None = None) -> PartialAttention:
    q, k, v = inputs(magnitude)
    return attend_row_with_lse(q, k[first:last], v[first:last], SPEC, scale=0.3, sinks=sinks)


@pytest.mark.parametrize("at", range(KEYS + 1))
@pytest.mark.parametrize("magnitude", [1.0, 1000.0])
def test_two_parts_merge_to_the_whole(at, magnitude):
    """Also where one part has no keys, and where exponentials of scores overflow."""
    whole = part(0, KEYS, magnitude=magnitude)
    assert torch.isfinite(whole.lse).all()
    for merged in (
        merge_attention(part(0, at, magnitude=magnitude), part(at, KEYS, magnitude=magnitude)),
        merge_attention(part(at, KEYS, magnitude=magnitude), part(0, at, magnitude=magnitude)),
    ):
        torch.testing.assert_close(merged.out, whole.out)
        torch.testing.assert_close(merged.lse, whole.lse)


def test_the_order_in_which_three_parts_merge_does_not_matter():
    a, b, c = part(0, 3), part(3, 10), part(10, KEYS)
    left, right = merge_attention(merge_attention(a, b), c), merge_attention(a, merge_attention(b, c))
    torch.testing.assert_close(left.out, right.out)
    torch.testing.assert_close(left.lse, right.lse)


def test_a_part_that_saw_nothing_changes_no_bit():
    seen, nothing = part(0, KEYS), part(0, 0)
    assert (nothing.lse == -torch.inf).all() and (nothing.out == 0).all()
    for merged in (merge_attention(seen, nothing), merge_attention(nothing, seen)):
        assert torch.equal(merged.out, seen.out) and torch.equal(merged.lse, seen.lse)


def test_two_parts_that_saw_nothing_give_nothing():
    merged = merge_attention(part(0, 0), part(0, 0))
    assert (merged.lse == -torch.inf).all() and (merged.out == 0).all()


def test_one_part_has_the_sinks():
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    whole = part(0, KEYS, sinks=sinks)
    for at in (0, 5):
        merged = merge_attention(part(0, at, sinks=sinks), part(at, KEYS))
        torch.testing.assert_close(merged.out, whole.out)
        torch.testing.assert_close(merged.lse, whole.lse)
    assert torch.equal(part(0, 0, sinks=sinks).lse[0], sinks)


def test_the_output_is_that_of_attention_without_it():
    q, k, v = inputs()
    assert torch.equal(part(0, KEYS).out, attend_row(q, k, v, SPEC, scale=0.3))


def test_narrow_outputs_are_summed_wide():
    first, second = part(0, 5), part(5, KEYS)
    narrow = [PartialAttention(each.out.bfloat16(), each.lse) for each in (first, second)]
    merged = merge_attention(*narrow)
    assert merged.out.dtype == torch.bfloat16 and merged.lse.dtype == torch.float32
    torch.testing.assert_close(merged.out.float(), part(0, KEYS).out, rtol=0.02, atol=0.02)


def test_a_device_that_does_not_declare_it_is_refused_it():
    assert undeclared(SPEC, Capabilities()) == ["the log-sum-exp of attention"]
    assert undeclared(SPEC, Capabilities(attention_lse=True)) == []
