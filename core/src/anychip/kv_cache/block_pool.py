"""Hands out KV blocks and counts who holds them. Does not decide who gets them: scheduler/ does.

A block is free, held (reference count above 0), or deferred: nobody holds it, but a step in flight may still
touch it. Free blocks keep their prefix key until they are handed out again. A free block without a key can never be
found again, so it is handed out before any that has one; those with a key go least recently used first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable

from anychip.types import NULL_BLOCK, BlockId


class BlockPool:
    """Every operation is O(1) per block. A transfer that reads or writes blocks holds a reference of its own
    (`take`, then `release`) for as long as it runs."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_count = [0] * num_blocks
        self.ref_count[NULL_BLOCK] = 1  # never handed out
        self.num_returned = 0
        """Grows whenever a block becomes free: while it stands still, what did not fit does not fit."""
        self._free: OrderedDict[BlockId, None] = OrderedDict.fromkeys(BlockId(i) for i in range(1, num_blocks))
        self._free_with_key: OrderedDict[BlockId, None] = OrderedDict()
        self._num_held = 0
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, BlockId] = {}
        self._deferred: deque[tuple[int, BlockId]] = deque()
        self._fence_of = [0] * num_blocks
        self._launched = 0
        self._retired = 0

    @property
    def num_free(self) -> int:
        """Blocks that allocate can hand out now."""
        return len(self._free) + len(self._free_with_key)

    @property
    def num_usable(self) -> int:
        """Blocks that can ever be handed out."""
        return self.num_blocks - 1

    @property
    def num_deferred(self) -> int:
        """Blocks that nobody holds and that steps in flight keep from being handed out."""
        return self.num_usable - self._num_held - self.num_free

    def allocate(self, count: int) -> list[BlockId]:
        """`count` blocks, each with one reference. The caller has checked num_free."""
        free, ref_count = self._free, self.ref_count
        if count == 1 and free:  # most calls
            block, _ = free.popitem(last=False)
            ref_count[block] = 1
            self._num_held += 1
            return [block]
        assert count <= self.num_free, f"{count} blocks asked, {self.num_free} free"
        blocks = [free.popitem(last=False)[0] for _ in range(min(count, len(free)))]
        for _ in range(count - len(blocks)):
            block, _ = self._free_with_key.popitem(last=False)
            key = self._key_of[block]
            assert key is not None
            del self._by_key[key]
            self._key_of[block] = None
            blocks.append(block)
        for block in blocks:
            ref_count[block] = 1
        self._num_held += count
        return blocks

    def take(self, blocks: Iterable[BlockId]) -> None:
        """Adds one reference to each block, and revives blocks that are free or deferred."""
        ref_count = self.ref_count
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            if ref_count[block] == 0:
                self._num_held += 1
                (self._free if self._key_of[block] is None else self._free_with_key).pop(block, None)
            ref_count[block] += 1

    def release(self, blocks: Iterable[BlockId]) -> None:
        """Takes one reference from each block. Among equals, the block that was released first is handed out first."""
        ref_count, released = self.ref_count, []
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            left = ref_count[block] = ref_count[block] - 1
            assert left >= 0, f"block {block} released twice"
            if left == 0:
                released.append(block)
        self._num_held -= len(released)
        if self._launched == self._retired:
            self._return(released)
        for block in released if self._launched > self._retired else ():
            self._fence_of[block] = self._launched
            self._deferred.append((self._launched, block))

    def launched(self, step_id: int) -> None:
        """Called when a step that touches held blocks is launched. Step ids grow."""
        self._launched = step_id

    def retired(self, step_id: int) -> None:
        """Called when this step and all before it are done: the blocks that they kept from the pool return."""
        self._retired = step_id
        deferred, returned = self._deferred, []
        while deferred and deferred[0][0] <= step_id:
            fence, block = deferred.popleft()
            # A block that was revived and released again stands in the queue twice, and its last fence counts.
            if self.ref_count[block] == 0 and self._fence_of[block] == fence:
                self._fence_of[block] = 0
                returned.append(block)
        self._return(returned)

    def count_free(self, blocks: Iterable[BlockId]) -> int:
        """How many of the blocks allocate could hand out."""
        ref_count, free, with_key = self.ref_count, self._free, self._free_with_key
        return sum(ref_count[block] == 0 and (block in with_key or block in free) for block in blocks)

    def is_writable(self, block: BlockId) -> bool:
        """Whether a holder may write: nobody else holds it, and the prefix cache does not offer it."""
        return self.ref_count[block] == 1 and self._key_of[block] is None

    def find(self, key: bytes) -> BlockId | None:
        """The block that the prefix cache offers under a key."""
        return self._by_key.get(key)

    def forget(self) -> None:
        """Withdraws every block that the prefix cache offers."""
        for block in self._by_key.values():
            self._key_of[block] = None
        self._by_key.clear()
        self._free.update(self._free_with_key)
        self._free_with_key.clear()

    @property
    def offers_any(self) -> bool:
        return bool(self._by_key)

    def withdraw(self, block: BlockId) -> bool:
        """Takes a block back from the prefix cache, so that its holder may write it. False where others hold it too."""
        key = self._key_of[block]
        if self.ref_count[block] != 1 or key is None:
            return False
        del self._by_key[key]
        self._key_of[block] = None
        return True

    def offer(self, key: bytes, block: BlockId) -> None:
        """Offers a full block that somebody holds; the first block under a key stays."""
        if self._key_of[block] is None and key not in self._by_key:
            self._key_of[block] = key
            self._by_key[key] = block

    def check_integrity(self, held: Counter[BlockId]) -> None:
        """Raises AssertionError unless the pool's books agree with each other and with `held`, the references that
        its users know of. O(num_blocks): for tests."""
        for block in range(1, self.num_blocks):
            references = self.ref_count[block]
            assert references == held[BlockId(block)], (
                f"block {block}: {references} counted, {held[BlockId(block)]} held"
            )
        assert self._num_held == len(held)
        assert not self._free.keys() & self._free_with_key.keys(), "a block is free twice"
        free = self._free.keys() | self._free_with_key.keys()
        assert not free & held.keys(), "a block is free and held"
        waiting = {block for _, block in self._deferred if not self.ref_count[block]} - free
        assert len(free) + len(held) + len(waiting) == self.num_usable, "a block is lost"
        assert all(self._key_of[block] is None for block in self._free), "a free block that can be found goes first"
        assert all(self._key_of[block] is not None for block in self._free_with_key)
        assert {block: key for key, block in self._by_key.items()} == {
            block: key for block, key in enumerate(self._key_of) if key is not None
        }, "keys and blocks disagree"

    def _return(self, blocks: list[BlockId]) -> None:
        key_of, free, with_key = self._key_of, self._free, self._free_with_key
        for block in blocks:
            (free if key_of[block] is None else with_key)[block] = None
        self.num_returned += len(blocks)


def exceeds(need: dict[BlockPool, int]) -> bool:
    """Whether some pool has fewer free blocks than it needs."""
    for pool, count in need.items():  # noqa: SIM110  # a generator costs more than what it looks at
        if count > pool.num_free:
            return True
    return False
