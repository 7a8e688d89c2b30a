"""An engine whose workers draft: what comes back changes no token, costs nobody a block, and is as long as it pays."""

from __future__ import annotations

import random

import numpy as np
import pytest
from drafts_kit import WORKLOADS, alone, drafting_engine, engine, message, run
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.drafts import NO_DRAFT
from anychip.speculation.draft_model import EVIDENCE, ReturnedDrafts
from anychip.speculation.lengths import Acceptance, StepCosts, choose_depth


@settings(max_examples=150, deadline=None)
@given(
    **WORKLOADS,
    seed=st.integers(0, 1000),
)
def test_every_sequence_is_what_is_drawn_without_a_draft_model(
    prompts, max_output, n, right, max_drafts, num_blocks, budget, max_in_flight, seed
):
    """Blocks are short in some, so that sequences are preempted while drafts are on their way."""
    core, device = drafting_engine(
        random.Random(seed), right, max_drafts=max_drafts, max_in_flight=max_in_flight, num_blocks=num_blocks,
        budget=budget,
    )  # fmt: skip
    found = run(core, [message(str(at), prompt, max_output, n) for at, prompt in enumerate(prompts)])
    for (name, index), tokens in found.items():
        assert tokens == alone(prompts[int(name)], index, max_output), (name, index)
    assert len(found) == len(prompts) * n
    pool = core.scheduler.kv.pool
    assert pool.num_free == pool.num_usable and device.most_drafts <= max_drafts


def test_right_drafts_save_steps_and_are_all_drawn():
    core, device = drafting_engine(random.Random(0), 1.0, max_in_flight=2)
    device.caught_up = 1.0
    run(core, [message("a", [5, 6, 7], 30, stops=())])
    stats = core.scheduler.stats
    assert stats.steps == 7 and device.most_drafts == 4, "1 token of the prompt's step, then 5 a step"
    assert stats.speculation.accepted == stats.speculation.drafted == 24 - 1


def test_blocks_for_guesses_are_the_first_to_go_back():
    """Pools from one sequence's size on: with a draft model, nobody is preempted more often."""
    messages = [message(name, [3, 4, 5, 6], 21, stops=()) for name in "abc"]
    for num_blocks in range(8, 24):
        preemptions = []
        for core, _ in (
            engine(None, num_blocks=num_blocks, prefix_caching=False),
            drafting_engine(random.Random(1), 0.0, max_drafts=6, num_blocks=num_blocks, prefix_caching=False),
        ):
            run(core, messages)
            preemptions.append(core.scheduler.stats.preemptions)
        assert preemptions[1] <= preemptions[0], num_blocks


def test_nothing_is_drafted_where_the_draft_model_is_slow():
    costs, passes = StepCosts([(1, 0.01), (64, 0.011)]), StepCosts([(1, 0.02), (64, 0.02)])
    core, device = drafting_engine(random.Random(0), 1.0, costs=costs, draft_costs=passes, max_in_flight=2)
    collect, overlapped = core.executor.collect, []
    core.executor.collect = lambda: (overlapped.append(len(device.pending)), collect())[1]
    run(core, [message("a", [5, 6], 25, stops=())])
    assert device.num_proposed == 0 and overlapped == [2] * 24 + [1]


def test_nothing_is_drafted_under_load():
    """A step's time grows with its tokens from eight on: drafts pay for one sequence, and not for eight."""
    costs, passes = StepCosts([(1, 0.01), (8, 0.01), (64, 0.08)]), StepCosts([(1, 0.001), (64, 0.004)])
    core, device = drafting_engine(random.Random(0), 0.7, costs=costs, draft_costs=passes, num_blocks=200)
    run(core, [message(str(at), [5, 6, at], 24, stops=()) for at in range(8)])
    alone_proposed, device.num_proposed = device.num_proposed, 0
    assert alone_proposed < 8 * 24 / 4
    run(core, [message("one", [5, 6], 24, stops=())])
    assert device.num_proposed > 20


@settings(max_examples=200, deadline=None)
@given(
    rates=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6),
    most=st.integers(1, 6),
    others=st.integers(0, 20),
    slope=st.floats(0.0, 0.5),
    passes=st.floats(0.01, 1.0),
)
def test_the_depth_is_the_one_that_brings_most(rates, most, others, slope, passes):
    costs, draft_costs = StepCosts([(1, 1.0), (101, 1.0 + 100 * slope)]), StepCosts([(1, passes), (101, passes)])
    longest, num_rows = np.full(len(rates), most), len(rates) + others
    chances = Acceptance().chances(np.full(len(rates), EVIDENCE), longest, np.array(rates))
    depth, rate = choose_depth(
        chances, longest, num_rows=num_rows, costs=costs, draft_costs=draft_costs, overhead_s=0.0
    )
    brings = [num_rows / costs(num_rows)] + [
        (num_rows + chances[:, :k].sum()) / (costs(num_rows + k * len(rates)) + k * passes) for k in range(1, most + 1)
    ]
    assert rate == pytest.approx(max(brings)) and brings[depth] == pytest.approx(max(brings))


def test_what_is_left_of_a_draft_that_holds_is_still_one():
    drafter = ReturnedDrafts()
    drafter.extend([1, 2, 3])
    assert drafter.draft(4) == NO_DRAFT
    drafter.returned(5, [6, 7, 8, 9])
    assert drafter.draft(4) == NO_DRAFT, "two tokens before it are not told yet"
    drafter.extend([4, 5])
    assert drafter.draft(3).token_ids == [6, 7, 8]
    drafter.extend([6])
    assert drafter.draft(9).token_ids == [7, 8, 9]
    drafter.extend([7, 1])
    assert drafter.draft(9) == NO_DRAFT
    drafter.returned(7, [6])
    assert drafter.draft(9) == NO_DRAFT, "it is behind a text that has gone on"
