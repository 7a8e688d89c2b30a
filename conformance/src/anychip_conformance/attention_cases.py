"""Batches that the attention sections are made of, and how others are drawn.

Sizes of rows count in the device's blocks: Row(blocks, extra, query) has blocks x block_size + extra tokens of context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from anychip_conformance.batch import Row
from anychip_conformance.paged import AttentionCase


def rows(*sizes: Sequence[int]) -> tuple[Row, ...]:
    return tuple(Row(*size) for size in sizes)


RAGGED = rows((0, 0, 5), (1, 0, 1), (2, 1, 3), (0, 0, 1), (1, -1, 2), (3, 0, 1))
DECODE = rows((0, 1, 1), (1, -1, 1), (1, 0, 1), (1, 1, 1), (2, 3, 1))

# -- tier B ---------------------------------------------------------------------------------------------------

EDGES = st.sampled_from([-1, 0, 1, 2, 7])
_row = st.one_of(
    st.builds(Row, st.integers(0, 3), EDGES, st.just(1)),
    st.builds(Row, st.integers(0, 2), EDGES, st.sampled_from([1, 2, 3, 8, 15, 16, 17])),
    st.builds(Row, st.just(0), st.just(0), st.sampled_from([1, 2, 16, 17, 33])),
    st.builds(Row, st.just(0), st.just(0), st.just(0)),
)
_heads = st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1), (6, 2), (8, 8), (3, 1), (5, 5)])


@st.composite
def drawn(draw: Any, **fixed: Any) -> AttentionCase:
    """Any batch; `fixed` are strategies or values of fields that a kind is about."""
    num_heads, num_kv_heads = draw(_heads)
    values = {
        "rows": tuple(draw(st.lists(_row, min_size=1, max_size=5).filter(lambda r: any(row.query for row in r)))),
        "dtype": draw(st.sampled_from(["any", "narrow"])),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": draw(st.sampled_from([8, 16, 24, 32, 48, 64, 80])),
        "page": draw(st.integers(0, 4)),
        "pad_tokens": draw(st.sampled_from([0, 0, 1, 3])),
        "pad_rows": draw(st.sampled_from([0, 0, 2])),
        "strided": draw(st.booleans()),
        "guarded": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }
    values |= {name: draw(value) if isinstance(value, st.SearchStrategy) else value for name, value in fixed.items()}
    return AttentionCase(**values)
