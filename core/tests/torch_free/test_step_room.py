"""The room of a step: what is counted at once is what would be granted one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from anychip.scheduler.step_room import StepRoom
from anychip.worker_report import DeviceRules

few = st.integers(1, 40)


@given(
    st.builds(
        DeviceRules,
        max_tokens=st.none() | few,
        max_rows=st.none() | few,
        max_prefills=st.none() | few,
        max_padded_tokens=st.none() | few,
        chunk_multiple=st.integers(1, 8),
    ),
    few,
    few,
    st.sampled_from(["any", "one token", "more tokens"]),
)
def test_rows_of_one_token_are_counted_as_they_are_granted(rules, max_tokens, max_rows, rows):
    one_by_one, at_once = (StepRoom(rules, max_tokens, max_rows, rows) for _ in range(2))
    granted = 0
    while one_by_one.grant(1):
        one_by_one.take(1, prefill=False)
        granted += 1
    assert at_once.num_ones == granted
    at_once.take_ones(granted)
    for behind in range(1, 50):
        assert at_once.grant(behind) == one_by_one.grant(behind)
    assert at_once.is_full == one_by_one.is_full
