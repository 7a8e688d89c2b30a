"""States that the prefix cache keeps: after which tokens a chunk ends so that there is one, and which are found again.

A state says nothing of the tokens before its last one, so it is offered as a whole, under the hash of the block that
ends there. Who goes on from it copies it first, as the blocks of tokens are copied that others may read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from anychip.kv_cache.block_pool import BlockPool
from anychip.kv_cache.hashing import extend_hashes
from anychip.kv_cache.kinds import TokenBlocks
from anychip.kv_cache.sharing import Shared, find_prefix, prefix_key
from anychip.request import Request
from anychip.types import BlockId

EVERY = 2048
"""A long prompt has a state at every so many tokens."""
MOST_SEEN = 1 << 16
"""Blocks of prompts that are remembered by their hashes, for models that keep no blocks of tokens."""


class Checkpoints:
    """Of the group of states, which is the last of `num_groups`. `block_size`: tokens under one hash."""

    def __init__(self, states: BlockPool, num_groups: int, block_size: int) -> None:
        self._states = states
        self._group = num_groups - 1
        self._size = block_size
        self._seen: OrderedDict[bytes, None] = OrderedDict()  # the one that was seen longest ago first

    def stop(self, request: Request, start: int) -> int:
        """How many tokens from `start` on a chunk should have to end where a state is worth keeping: at the last full
        block of the prompt, where requests part whose prompts began alike, and at every EVERY tokens. 0: anywhere."""
        ends = ((request.num_prompt - 1) // self._size * self._size, request.junction, (start // EVERY + 1) * EVERY)
        return min((end - start for end in ends if end > start + 1), default=0)

    def offer(self, request: Request) -> None:
        """Offers the state after the tokens that are computed, or will be by the steps in flight, where a block ends
        there and every token is known. From then on the request's next step works on a copy."""
        at, size = request.num_computed, self._size
        if at % size or not 0 < at <= request.num_known or request.num_cached_blocks[self._group]:
            return
        (block,) = request.block_ids[self._group]
        self._states.offer(self._key(request, at), block)
        request.next_change_at = 0

    def find(self, groups: Sequence[TokenBlocks], pool: BlockPool, request: Request) -> Shared:
        """The longest prefix that every group of tokens can offer and that a state ends. Where the groups of tokens can
        offer more, the request is to leave a state there for those who come after it."""
        limit = (request.num_known - 1) // self._size * self._size
        request.junction = 0 if groups else self._parted(request, limit)
        while limit:
            shared = find_prefix(groups, pool, request, self._size, limit)
            if groups:
                request.junction = max(request.junction, shared.num_tokens)
            limit, state = self._deepest(request, shared.num_tokens)
            if state is not None and limit == shared.num_tokens:
                return Shared(limit, [*shared.tables, [state]])
        return Shared(0, [[] for _ in range(self._group + 1)])

    def remember(self, request: Request) -> None:
        """Notes how an entering prompt begins, where no block of tokens will tell."""
        if self._group:
            return
        for each in self._hashes(request, request.num_prompt // self._size):
            self._seen.pop(each, None)
            self._seen[each] = None
        while len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)

    def _parted(self, request: Request, limit: int) -> int:
        """How many of the first `limit` tokens begin an earlier prompt too."""
        for block in range(limit // self._size):
            if self._hashes(request, block + 1)[block] not in self._seen:
                return block * self._size
        return limit

    def _deepest(self, request: Request, limit: int) -> tuple[int, BlockId | None]:
        """The last token of the first `limit` behind which a state is on offer."""
        if self._states.offers_any:
            for at in range(limit, 0, -self._size):
                block = self._states.find(self._key(request, at))
                if block is not None:
                    return at, block
        return 0, None

    def _key(self, request: Request, at: int) -> bytes:
        last = at // self._size
        return prefix_key(self._group, self._hashes(request, last)[last - 1])

    def _hashes(self, request: Request, count: int) -> Sequence[bytes]:
        """Of the first `count` blocks, at least."""
        hashes = request.block_hashes
        return hashes if len(hashes) >= count else extend_hashes(request, self._size, count)
