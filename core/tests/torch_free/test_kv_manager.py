"""Prefix hits, windows, copy-on-write and forks."""

from __future__ import annotations

from engine_kit import answer, counts, make_request, make_scheduler, run_to_end

from anychip.kv_cache.kinds import blocks_per_request
from anychip.prefix import PrefixRoot
from anychip.types import NULL_BLOCK
from anychip.worker_report import KVGroup

PROMPT = list(range(10, 30))  # 20 tokens, 5 blocks of 4


def test_a_second_identical_prompt_computes_at_most_one_block():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", PROMPT, arrival=1))
    run_to_end(scheduler)
    second = make_request("b", PROMPT, arrival=2)
    scheduler.add(second)
    step = scheduler.schedule()
    assert counts(step.decision) == [4]
    assert second.cached_tokens == 16


def test_a_different_salt_shares_nothing():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", PROMPT, arrival=1))
    run_to_end(scheduler)
    other = make_request("b", PROMPT, arrival=2, prefix_root=PrefixRoot(salt="tenant"))
    scheduler.add(other)
    scheduler.schedule()
    assert other.cached_tokens == 0


def test_a_prefix_that_differs_early_shares_only_what_is_before():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", PROMPT, arrival=1))
    run_to_end(scheduler)
    other = make_request("b", PROMPT[:9] + [99] + PROMPT[10:], arrival=2)
    scheduler.add(other)
    scheduler.schedule()
    assert other.cached_tokens == 8


def test_generated_tokens_are_offered_too():
    scheduler = make_scheduler()
    first = make_request("a", PROMPT, max_output=9, arrival=1)
    scheduler.add(first)
    run_to_end(scheduler)
    longer = make_request("b", [*first.token_ids, 99], arrival=2)
    scheduler.add(longer)
    scheduler.schedule()
    assert longer.cached_tokens == 28  # 29 known, the last one never computed


def test_without_prefix_caching_nothing_is_shared():
    scheduler = make_scheduler(prefix_caching=False)
    scheduler.add(make_request("a", PROMPT, arrival=1))
    run_to_end(scheduler)
    second = make_request("b", PROMPT, arrival=2)
    scheduler.add(second)
    scheduler.schedule()
    assert second.cached_tokens == 0


WINDOWED = (KVGroup(block_size=4), KVGroup(block_size=4, window=6))


def test_a_windowed_group_gives_back_what_the_window_has_passed():
    scheduler = make_scheduler(groups=WINDOWED, budget=8)
    request = make_request("a", PROMPT, max_output=8)
    scheduler.add(request)
    for _ in range(4):
        answer(scheduler, scheduler.schedule())
    full, windowed = request.block_ids
    assert NULL_BLOCK not in full
    # The last token computed, at position 20, saw positions 15 to 20: blocks 0 to 2 are gone.
    assert windowed[:3] == [NULL_BLOCK] * 3
    assert NULL_BLOCK not in windowed[3:]


def test_a_windowed_group_hits_on_the_blocks_that_the_window_still_sees():
    scheduler = make_scheduler(groups=WINDOWED, num_blocks=64)
    scheduler.add(make_request("a", PROMPT, arrival=1))
    run_to_end(scheduler)
    second = make_request("b", PROMPT, arrival=2)
    scheduler.add(second)
    scheduler.schedule()
    assert second.cached_tokens == 16
    assert second.block_ids[1][:2] == [NULL_BLOCK] * 2
    assert NULL_BLOCK not in second.block_ids[1][3:]


def test_a_windowed_group_bounds_what_one_request_holds():
    assert blocks_per_request(WINDOWED, 1000, 8) == 250 + 5
    assert blocks_per_request(WINDOWED, 8, 64) == 2 + 2


def forked(scheduler, count=4, prompt=PROMPT):
    parent = make_request("p", prompt, arrival=1)
    children = [make_request(f"c{i}", prompt, arrival=2 + i, fork_of=parent) for i in range(count - 1)]
    for request in (parent, *children):
        scheduler.add(request)
    return parent, children


def test_forks_wait_for_the_prompt_and_share_its_blocks():
    scheduler = make_scheduler(prefix_caching=False)
    parent, children = forked(scheduler)
    first = scheduler.schedule()
    assert counts(first.decision) == [20]
    answer(scheduler, first)
    second = scheduler.schedule()
    assert counts(second.decision) == [1, 1, 1, 1]
    shared = set(parent.block_ids[0][:4])
    for child in children:
        assert set(child.block_ids[0][:4]) == shared
        assert child.cached_tokens == 19
    held = {block for request in (parent, *children) for block in request.block_ids[0]}
    assert len(held) <= 4 + 2 * 4, "four blocks are shared, each sequence has its own end"


def test_a_fork_copies_the_block_that_it_writes():
    scheduler = make_scheduler(prefix_caching=False)
    parent, children = forked(scheduler)
    answer(scheduler, scheduler.schedule())
    step = scheduler.schedule()
    last = {request.block_ids[0][4] for request in (parent, *children)}
    assert len(last) == 4
    sources = {source for source, _ in step.decision.copies}
    assert len(step.decision.copies) >= 3
    assert len(sources) == 1


def test_a_prefix_block_is_never_written_by_who_shares_it():
    scheduler = make_scheduler()
    _, _ = forked(scheduler)
    answer(scheduler, scheduler.schedule())
    while scheduler.has_work:
        step = scheduler.schedule()
        for request in scheduler.running:
            block = request.block_ids[0][(request.num_computed - 1) // 4]
            assert scheduler.kv.pool.is_writable(block)
        answer(scheduler, step)
    assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_usable


def test_a_fork_whose_parent_has_ended_goes_its_own_way():
    scheduler = make_scheduler()
    parent, children = forked(scheduler, count=2)
    scheduler.abort(parent.request_id, 0)
    run_to_end(scheduler)
    assert children[0].num_output == 4
