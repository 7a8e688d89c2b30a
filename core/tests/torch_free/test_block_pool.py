"""Reference counts, deferred frees and the LRU order of the block pool."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from anychip.kv_cache.block_pool import BlockPool
from anychip.types import NULL_BLOCK


def test_blocks_are_handed_out_least_recently_used_first():
    pool = BlockPool(4)
    first, second, third = pool.allocate(3)
    pool.release([second])
    pool.release([first, third])
    assert pool.allocate(3) == [second, first, third]


def test_a_block_freed_under_a_step_in_flight_returns_when_that_step_is_retired():
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.launched(1)
    pool.launched(2)
    pool.release(blocks)
    pool.retired(1)
    assert pool.num_free == 0
    assert pool.num_deferred == 2
    pool.retired(2)
    assert pool.num_free == 2


def test_a_deferred_block_revived_by_a_hit_stays_held():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.offer(b"key", block)
    pool.launched(1)
    pool.release([block])
    assert pool.find(b"key") == block
    pool.take([block])
    pool.retired(1)
    assert pool.num_free == 0
    assert pool.ref_count[block] == 1


def test_a_block_freed_twice_waits_for_the_later_step():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.launched(1)
    pool.release([block])
    pool.take([block])
    pool.launched(2)
    pool.release([block])
    pool.retired(1)
    assert pool.num_free == 0, "step 2 still touches it"
    pool.retired(2)
    assert pool.num_free == 1


def test_a_transfers_reference_keeps_a_block_beyond_its_request():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.take([block])  # the transfer's
    pool.release([block])
    assert pool.num_free == 0
    pool.release([block])
    assert pool.num_free == 1


def test_a_reused_block_is_no_longer_offered():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.offer(b"key", block)
    pool.release([block])
    assert pool.find(b"key") == block
    pool.allocate(1)
    assert pool.find(b"key") is None


def test_a_shared_or_offered_block_is_not_writable():
    pool = BlockPool(3)
    shared, offered = pool.allocate(2)
    pool.take([shared])
    pool.offer(b"key", offered)
    assert not pool.is_writable(shared)
    assert not pool.is_writable(offered)


def test_releasing_more_often_than_taking_is_our_own_bug():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)


class PoolMachine(RuleBasedStateMachine):
    """Random holders, steps and offers beside a plain count of references."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(9)
        self.held: list[int] = []
        self.steps: list[int] = []
        self.next_step = 1

    @precondition(lambda self: self.pool.num_free)
    @rule(data=st.data())
    def allocate(self, data):
        count = data.draw(st.integers(1, self.pool.num_free))
        blocks = self.pool.allocate(count)
        assert NULL_BLOCK not in blocks
        assert not set(blocks) & set(self.held)
        self.held += blocks

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        block = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release([block])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data):
        block = data.draw(st.sampled_from(self.held))
        self.pool.take([block])
        self.held.append(block)

    @rule(key=st.sampled_from([b"a", b"b", b"c"]))
    def offer_or_hit(self, key):
        block = self.pool.find(key)
        if block is not None:
            self.pool.take([block])
            self.held.append(block)
        elif self.held:
            self.pool.offer(key, self.held[-1])

    @rule()
    def launch(self):
        self.pool.launched(self.next_step)
        self.steps.append(self.next_step)
        self.next_step += 1

    @precondition(lambda self: self.steps)
    @rule()
    def retire(self):
        self.pool.retired(self.steps.pop(0))

    @invariant()
    def every_block_is_free_held_or_deferred(self):
        held = set(self.held)
        assert self.pool.num_free + len(held) + self.pool.num_deferred == self.pool.num_usable
        for block in held:
            assert self.pool.ref_count[block] == self.held.count(block)
        if not self.steps:
            assert self.pool.num_deferred == 0


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
