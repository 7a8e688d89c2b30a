"""Which steps become graphs."""

from __future__ import annotations

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
        num_tokens=rows * longest, num_reqs=rows, max_query_len=longest, num_pages=pages, features=features
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


def test_prompts_and_scores_keep_their_own_sizes():
    shapes = DecodeShapes(limits(256, 512))
    assert bucket(shapes, 3, 7, longest=5).num_tokens == 15
    assert bucket(shapes, 3, 7, features=(SCORES,)).num_reqs == 3


def test_a_long_context_costs_few_shapes():
    assert len(DecodeShapes(limits(256, 8192)).keys()) <= 80
