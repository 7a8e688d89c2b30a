"""States: a block of their own pool for as long as a request has a slot, which nobody else writes."""

from __future__ import annotations

from array import array

import pytest
from engine_kit import add_message, answer, make_core, make_request, make_scheduler, run_to_end

from anychip.drafts import Draft, Drafter
from anychip.errors import InvalidRequest
from anychip.kv_cache.kinds import blocks_per_request
from anychip.kv_cache.manager import KVCacheManager
from anychip.launch.kv_fit import longest_that_fits
from anychip.speculation.proposer import Proposer
from anychip.speculation.speculator import Speculator
from anychip.worker_report import KVCacheConfig, KVGroup, StateGroup

HYBRID = (KVGroup(block_size=4), StateGroup())
PROMPT = list(range(10, 30))


def state_of(request) -> int:
    (block,) = request.block_ids[1]
    return block


def test_a_request_has_one_state_from_its_first_token_to_its_last():
    scheduler = make_scheduler(groups=HYBRID, budget=8, prefix_caching=False)
    request = make_request("a", PROMPT, max_output=6)
    scheduler.add(request)
    first = scheduler.schedule()
    assert first.decision.new_rows[0].block_ids[1] == [state_of(request)]
    seen = {state_of(request)}
    answer(scheduler, first)
    while scheduler.has_work:
        step = scheduler.schedule()
        changes = array("i")
        changes.frombytes(step.decision.new_blocks)
        assert 1 not in list(changes)[1::4], "a state's block never changes"
        seen.add(state_of(request))
        answer(scheduler, step)
    assert len(seen) == 1
    assert scheduler.kv.states.num_free == scheduler.kv.states.num_usable


def test_states_are_given_back_by_preemption_and_abort():
    scheduler = make_scheduler(groups=HYBRID, prefix_caching=False)
    one, two = (make_request(name, PROMPT, arrival=at) for at, name in enumerate("ab"))
    scheduler.add(one)
    scheduler.add(two)
    answer(scheduler, scheduler.schedule())
    assert state_of(one) != state_of(two)
    free = scheduler.kv.states.num_free
    scheduler.preempt(two)
    assert (scheduler.kv.states.num_free, two.num_computed) == (free + 1, 0)
    scheduler.abort(one.request_id, 0)
    assert scheduler.kv.states.num_free == free + 2
    run_to_end(scheduler)


def test_a_state_is_not_handed_out_while_a_step_in_flight_may_write_it():
    scheduler = make_scheduler(groups=HYBRID, max_num_seqs=1, num_states=2)
    first, second = make_request("a", PROMPT, arrival=1), make_request("b", PROMPT, arrival=2)
    scheduler.add(first)
    scheduler.add(second)
    launched = scheduler.schedule()
    scheduler.abort(first.request_id, 0)
    assert scheduler.schedule() is None, "the only state is still written"
    answer(scheduler, launched)
    assert [row.slot for row in scheduler.schedule().decision.new_rows] == [second.slot]


def test_without_prefix_caching_nothing_is_kept_of_states():
    scheduler = make_scheduler(groups=HYBRID, prefix_caching=False)
    assert scheduler.kv.checkpoints is None
    scheduler.add(make_request("a", PROMPT, arrival=1))
    run_to_end(scheduler)
    again = make_request("b", PROMPT, arrival=2)
    scheduler.add(again)
    step = scheduler.schedule()
    assert again.cached_tokens == 0
    assert array("i", step.decision.num_tokens).tolist() == [len(PROMPT)]


def test_without_prefix_caching_forks_compute_their_prompts_at_once():
    scheduler = make_scheduler(groups=HYBRID, budget=64, prefix_caching=False)
    parent = make_request("p", PROMPT, arrival=1)
    child = make_request("c", PROMPT, arrival=2, fork_of=parent)
    scheduler.add(parent)
    scheduler.add(child)
    step = scheduler.schedule()
    assert array("i", step.decision.num_tokens).tolist() == [len(PROMPT)] * 2
    assert state_of(parent) != state_of(child)
    assert not step.decision.copies


def test_beams_are_refused():
    core = make_core(make_scheduler(groups=HYBRID))
    with pytest.raises(InvalidRequest, match="states of this model's layers cannot be shared"):
        core.admission.add(add_message("a", PROMPT, beam_width=2, n=2))


class Guess(Drafter):
    def extend(self, token_ids) -> None:
        pass

    def catch_up(self, most: int) -> int:
        return most

    def draft(self, most: int) -> Draft:
        return Draft([7] * most, evidence=1)


class AlwaysGuess(Proposer):
    def begin(self, tenant: str) -> Drafter:
        return Guess()

    def end(self, drafter: Drafter) -> None:
        pass


def test_nothing_is_drafted_for_states_that_cannot_go_back():
    speculator = Speculator(AlwaysGuess(), max_drafts=2, vocab_size=1000, costs=None)
    scheduler = make_scheduler(groups=HYBRID, speculator=speculator)
    assert scheduler.drafting is None
    scheduler.add(make_request("a", PROMPT))
    run_to_end(scheduler)


def test_states_count_for_no_block_of_tokens():
    assert blocks_per_request(HYBRID, 20, 64) == blocks_per_request(HYBRID[:1], 20, 64) == 5
    assert blocks_per_request((StateGroup(),), 10**9, 64) == 0
    assert longest_that_fits(KVCacheConfig(11, HYBRID, 5), 64) == 40
    assert longest_that_fits(KVCacheConfig(1, (StateGroup(),), 5), 64) > 10**9


def test_groups_of_tokens_come_first():
    with pytest.raises(AssertionError, match="come before"):
        KVCacheManager(KVCacheConfig(8, tuple(reversed(HYBRID)), 4), prefix_caching=False)
