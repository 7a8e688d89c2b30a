"""Which steps become graphs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anychip.plugin_api import SCORES, StepLimits
from anychip_triton.graph import DecodeShapes


def limits(rows: int, pages: int, tokens: int = 8192) -> StepLimits:
    return StepLimits(
        max_num_tokens=tokens, max_num_reqs=rows, max_model_len=16 * pages, max_slots=rows, max_pages=(pages,)
    )


def bucket(shapes: DecodeShapes, rows: int, pages: int, longest: int = 1, features: tuple[str, ...] = ()):
    return shapes.bucket(
        num_tokens=rows * longest,
        num_reqs=rows,
        num_samples=rows,
        max_query_len=longest,
        num_pages=pages,
        features=features,
    )


@given(most=st.integers(1, 600), pages=st.integers(1, 10_000), data=st.data())
def test_every_decode_step_has_the_smallest_shape_that_holds_it(most, pages, data):
    shapes = DecodeShapes(limits(most, pages))
    rows, used = data.draw(st.integers(1, most)), data.draw(st.integers(1, pages))
    key = bucket(shapes, rows, used)
    assert key in shapes.keys()  # noqa: SIM118 - a policy is no mapping
    assert key.num_tokens == key.num_reqs >= rows and key.num_pages >= used and key.max_query_len == 1
    smaller = [k for k in shapes.keys() if rows <= k.num_reqs < key.num_reqs and k.num_pages >= used]  # noqa: SIM118
    assert not smaller


@pytest.mark.parametrize(("tokens", "filled"), [(1, 16), (16, 16), (17, 32), (200, 256), (256, 256), (257, 257)])
def test_steps_with_prompts_are_filled_up_as_far_as_pieces_go(tokens, filled):
    shapes = DecodeShapes(limits(8, 32, tokens=300))
    assert shapes.pieces() == [16, 32, 64, 128, 192, 256]
    key = shapes.bucket(
        num_tokens=tokens, num_reqs=1, num_samples=1, max_query_len=max(2, tokens), num_pages=9, features=()
    )
    assert (key.num_tokens, key.num_reqs, key.num_pages) == (filled, 1, 9)


def test_steps_with_scores_have_no_graph():
    assert bucket(DecodeShapes(limits(256, 512)), 3, 7, features=(SCORES,)).num_reqs == 3


def test_a_long_context_costs_few_shapes():
    assert len(DecodeShapes(limits(256, 8192)).keys()) <= 80
