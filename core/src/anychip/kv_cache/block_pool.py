"""Hands out KV blocks and counts who holds them. Does not decide who gets them: scheduler/ does.

A block is free, held (reference count above 0), or deferred: nobody holds it, but a step in flight may still
touch it. Free blocks keep their prefix hash until they are handed out again, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable

from anychip.types import NULL_BLOCK, BlockId


class BlockPool:
    """Every operation is O(1) per block. A transfer that reads or writes blocks holds a reference of its own
    (`take`, then `release`) for as long as it runs."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_count = [0] * num_blocks
        self.ref_count[NULL_BLOCK] = 1  # never handed out
        self._free: OrderedDict[BlockId, None] = OrderedDict.fromkeys(BlockId(i) for i in range(1, num_blocks))
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, BlockId] = {}
        self._deferred: deque[tuple[int, BlockId]] = deque()
        self._fence_of = [0] * num_blocks
        self._launched = 0
        self._retired = 0

    @property
    def num_free(self) -> int:
        """Blocks that allocate can hand out now."""
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Blocks that can ever be handed out."""
        return self.num_blocks - 1

    @property
    def num_deferred(self) -> int:
        """Blocks that nobody holds and that steps in flight keep from being handed out."""
        return len({block for _, block in self._deferred if self.ref_count[block] == 0})

    def allocate(self, count: int) -> list[BlockId]:
        """`count` blocks, each with one reference. The caller has checked num_free."""
        assert count <= len(self._free), f"{count} blocks asked, {len(self._free)} free"
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            key = self._key_of[block]
            if key is not None:
                del self._by_key[key]
                self._key_of[block] = None
            self.ref_count[block] = 1
            blocks.append(block)
        return blocks

    def take(self, block: BlockId) -> None:
        """One more reference, reviving a block that is free or deferred."""
        if self.ref_count[block] == 0:
            self._free.pop(block, None)
        self.ref_count[block] += 1

    def release(self, blocks: Iterable[BlockId]) -> None:
        """One reference less each. The first released is the first to be handed out again."""
        in_flight = self._launched > self._retired
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            self.ref_count[block] -= 1
            assert self.ref_count[block] >= 0, f"block {block} released twice"
            if self.ref_count[block] == 0:
                if in_flight:
                    self._fence_of[block] = self._launched
                    self._deferred.append((self._launched, block))
                else:
                    self._free[block] = None

    def launched(self, step_id: int) -> None:
        """A step that touches held blocks is in flight. Step ids grow."""
        self._launched = step_id

    def retired(self, step_id: int) -> None:
        """This step and all before it are done: what they kept from the pool returns."""
        self._retired = step_id
        while self._deferred and self._deferred[0][0] <= step_id:
            fence, block = self._deferred.popleft()
            if self.ref_count[block] == 0 and self._fence_of[block] == fence and block not in self._free:
                self._free[block] = None

    def is_writable(self, block: BlockId) -> bool:
        """Whether a holder may write: nobody else holds it, and the prefix cache does not offer it."""
        return self.ref_count[block] == 1 and self._key_of[block] is None

    def find(self, key: bytes) -> BlockId | None:
        """The block that the prefix cache offers under a key."""
        return self._by_key.get(key)

    def forget(self) -> None:
        """Offers nothing any more."""
        for block in self._by_key.values():
            self._key_of[block] = None
        self._by_key.clear()

    def offer(self, key: bytes, block: BlockId) -> None:
        """Offers a full block; the first block under a key stays."""
        if self._key_of[block] is None and key not in self._by_key:
            self._key_of[block] = key
            self._by_key[key] = block
