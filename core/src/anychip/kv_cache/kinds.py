"""How the blocks of each kind of cache group come and go: one class a kind, without blocks or requests of its own.

A group's table is a list of block ids, given and changed in place. A kind that comes to be adds a class here and a
branch in `kind_of`; the manager treats all alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import assert_never

from anychip.kv_cache.block_pool import BlockPool
from anychip.types import NULL_BLOCK, BlockId, cdiv
from anychip.worker_report import CacheGroup, KVGroup, StateGroup

Growth = tuple[int, list[int]]
"""What a table wants of its pool before some tokens can be computed: so many blocks behind those that it has, and
copies of those at these indexes, which are to be written and are somebody else's too."""


class GroupBlocks:
    """One kind. Numbers of tokens are counted from the sequence's beginning."""

    def needed(self, num_tokens: int) -> int:
        """Entries of the table of a sequence of so many tokens."""
        raise NotImplementedError

    def grow(self, pool: BlockPool, table: list[BlockId], start: int, end: int) -> Growth:
        """What the tokens from `start` to `end` want. Blocks that none of them sees are given back first."""
        raise NotImplementedError

    def num_full(self, num_tokens: int) -> int:
        """Blocks that so many tokens make full: what may be offered to others."""
        raise NotImplementedError

    def num_partial(self, num_tokens: int) -> int:
        """1 if so many shared tokens end within a block, which is then copied before it is written; else 0."""
        raise NotImplementedError

    def most_held(self, length: int, max_step_tokens: int) -> int:
        """Most blocks of the tokens' pool that one request of `length` tokens holds at once."""
        raise NotImplementedError


class TokenBlocks(GroupBlocks):
    """Full attention: a block for every `block_size` tokens, all of which every later token sees."""

    whole = True
    """Whether a prefix is only as long as its blocks are on offer from the first on."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def needed(self, num_tokens: int) -> int:
        return cdiv(num_tokens, self.block_size)

    def grow(self, pool: BlockPool, table: list[BlockId], start: int, end: int) -> Growth:
        size, held = self.block_size, len(table)
        first, wanted = start // size, -(-end // size)
        if first >= held:
            return wanted - held, []
        copied = [at for at in range(first, min(wanted, held)) if not pool.is_writable(table[at])]
        return max(0, wanted - held), copied

    def num_full(self, num_tokens: int) -> int:
        return num_tokens // self.block_size

    def num_partial(self, num_tokens: int) -> int:
        return int(num_tokens % self.block_size > 0)

    def first_visible(self, position: int) -> int:
        """Index of the first block that a token at `position` still sees."""
        return 0

    def most_held(self, length: int, max_step_tokens: int) -> int:
        return cdiv(length, self.block_size)


class WindowBlocks(TokenBlocks):
    """A sliding window: blocks that it has passed go back, and leave NULL_BLOCK in the table."""

    whole = False

    def __init__(self, block_size: int, window: int) -> None:
        super().__init__(block_size)
        self.window = window

    def grow(self, pool: BlockPool, table: list[BlockId], start: int, end: int) -> Growth:
        """The workers' tables keep the ids of what is given back: the window's mask hides them."""
        passed = start - self.window + 1
        for at in range(min(passed // self.block_size, len(table)) - 1, -1, -1):
            if table[at] == NULL_BLOCK:
                break
            pool.release([table[at]])
            table[at] = NULL_BLOCK
        return super().grow(pool, table, start, end)

    def first_visible(self, position: int) -> int:
        return max(0, position - self.window + 1) // self.block_size

    def most_held(self, length: int, max_step_tokens: int) -> int:
        return cdiv(min(length, self.window + max_step_tokens + self.block_size), self.block_size)


class StateBlocks(GroupBlocks):
    """State layers: one block, which every step rewrites: what it held some tokens ago is gone. It is offered and found
    as it stands (kv_cache/checkpoints), and who goes on from it writes a copy."""

    def needed(self, num_tokens: int) -> int:
        return 1

    def grow(self, pool: BlockPool, table: list[BlockId], start: int, end: int) -> Growth:
        if not table:
            return 1, []
        if pool.is_writable(table[0]) or (not pool.num_free and pool.withdraw(table[0])):
            return 0, []  # where no block is free, to go on is worth more than what the prefix cache offers
        return 0, [0]

    def num_full(self, num_tokens: int) -> int:
        return 0

    def num_partial(self, num_tokens: int) -> int:
        return 0

    def most_held(self, length: int, max_step_tokens: int) -> int:
        return 0  # of the states' pool it is always one


def kind_of(group: CacheGroup) -> GroupBlocks:
    match group:
        case KVGroup(block_size=size, window=None):
            return TokenBlocks(size)
        case KVGroup(block_size=size, window=window):
            assert window is not None
            return WindowBlocks(size, window)
        case StateGroup():
            return StateBlocks()
        case _:
            assert_never(group)


def token_groups(groups: Iterable[CacheGroup]) -> list[KVGroup]:
    """Those whose blocks are of the tokens' pool; they come before all others."""
    return [group for group in groups if isinstance(group, KVGroup)]


def blocks_per_request(groups: Iterable[CacheGroup], length: int, max_step_tokens: int) -> int:
    """Most blocks of the tokens' pool that one request of `length` tokens holds at once, over all groups."""
    return sum(kind_of(group).most_held(length, max_step_tokens) for group in groups)
