"""Keeps every request's block tables: prefix hits, growth, windows, copy-on-write, forks.

Layers with one spec form a group; groups have a table each and share the pool. Does not choose victims: when
blocks are short it says so and the scheduler decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from anychip.kv_cache.block_pool import BlockPool
from anychip.kv_cache.hashing import extend_hashes
from anychip.messages import KVCacheConfig, KVGroup
from anychip.request import Request
from anychip.types import NULL_BLOCK, BlockId, cdiv


@dataclass(slots=True)
class BlockChanges:
    """What a step's allocations mean for the workers, collected until the step is sent."""

    new_blocks: list[int] = field(default_factory=list)
    """Flat: slot, group, index in the table, block id."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, destination), in order."""
    fresh: list[int] = field(default_factory=list)
    """Blocks handed out, for devices that must zero them."""


class KVCacheManager:
    """`prefix_caching` False offers and finds nothing; forks still share."""

    def __init__(self, config: KVCacheConfig, *, prefix_caching: bool) -> None:
        self.groups = config.groups
        self.pool = BlockPool(config.num_blocks)
        self.prefix_caching = prefix_caching
        self.hash_block_size = min(group.block_size for group in config.groups)
        self.changes = BlockChanges()
        for group in config.groups:
            assert group.block_size % self.hash_block_size == 0, "block sizes divide each other"

    # -- admission ----------------------------------------------------------------------------------------

    def start(self, request: Request) -> int:
        """Gives a waiting request the blocks that a prefix hit or a fork lets it share. Returns the number of
        tokens that need no computing; at least one token is always left."""
        request.block_ids = [[] for _ in self.groups]
        request.num_cached_blocks = [0] * len(self.groups)
        if request.fork_of is not None and self._fork(request.fork_of, request):
            return request.num_computed
        if not self.prefix_caching or request.scores_prompt:  # a token is scored when it is computed
            return 0
        blocks = self._longest_hit(request)
        self._share_hit(request, blocks)
        request.num_computed = blocks * self.hash_block_size
        return request.num_computed

    def cancel_start(self, request: Request) -> None:
        """Undoes `start` when the request cannot be admitted after all."""
        self.free(request)
        request.num_computed = 0

    def _longest_hit(self, request: Request) -> int:
        """In hash blocks: the longest prefix that every group can offer."""
        hashes = extend_hashes(request, self.hash_block_size)
        longest = (request.num_known - 1) // self.hash_block_size
        settled = False
        while not settled and longest:
            settled = True
            for index, group in enumerate(self.groups):
                offered = self._group_hit(index, group, hashes, longest)
                if offered < longest:
                    longest, settled = offered, False
        return longest

    def _group_hit(self, index: int, group: KVGroup, hashes: list[bytes], limit: int) -> int:
        """In hash blocks: the longest prefix up to `limit` that one group can offer. A windowed group needs
        only the blocks that the next token still sees."""
        ratio = group.block_size // self.hash_block_size
        best = run = 0
        for block in range(limit // ratio):
            hit = self.pool.find(self._key(index, hashes[(block + 1) * ratio - 1])) is not None
            run = run + 1 if hit else 0
            if not hit and group.window is None:
                break
            length = (block + 1) * group.block_size
            first_needed = 0 if group.window is None else max(0, length - group.window + 1) // group.block_size
            if run >= block + 1 - first_needed:
                best = block + 1
        return best * ratio

    def _share_hit(self, request: Request, hash_blocks: int) -> None:
        length = hash_blocks * self.hash_block_size
        for index, group in enumerate(self.groups):
            ratio = group.block_size // self.hash_block_size
            first = _first_visible(group, length)
            table = request.block_ids[index]
            for block in range(length // group.block_size):
                if block < first:
                    table.append(NULL_BLOCK)
                    continue
                found = self.pool.find(self._key(index, request.block_hashes[(block + 1) * ratio - 1]))
                assert found is not None, "a hit vanished between search and use"
                self.pool.take(found)
                table.append(found)
            request.num_cached_blocks[index] = len(table)

    def _fork(self, parent: Request, child: Request) -> bool:
        """Shares the parent's prompt, all but its last token, which the child computes to sample from."""
        shared = parent.num_prompt - 1
        if shared < 1 or not parent.block_ids or parent.num_computed < parent.num_prompt:
            return False
        for index, group in enumerate(self.groups):
            table = parent.block_ids[index]
            first, last = _first_visible(group, shared), cdiv(shared, group.block_size)
            if len(table) < last or NULL_BLOCK in table[first:last]:
                return False  # the parent's window has moved past the prompt's end
        for index, group in enumerate(self.groups):
            table = child.block_ids[index]
            first = _first_visible(group, shared)
            for position, block in enumerate(parent.block_ids[index][: cdiv(shared, group.block_size)]):
                if position < first or block == NULL_BLOCK:
                    table.append(NULL_BLOCK)
                else:
                    self.pool.take(block)
                    table.append(block)
            child.num_cached_blocks[index] = shared // group.block_size
        child.block_hashes = parent.block_hashes[: shared // self.hash_block_size]
        child.num_computed = shared
        return True

    def adopt(self, moves: Sequence[tuple[Request, Request]]) -> None:
        """Each (request, source) gives the request the source's blocks in place of its own, all moves at once. The
        next to write a shared block copies it."""
        snapshots = [
            ([list(table) for table in source.block_ids], list(source.block_hashes), list(source.num_cached_blocks))
            for _, source in moves
        ]
        for tables, _, _ in snapshots:
            for block in (block for table in tables for block in table if block != NULL_BLOCK):
                self.pool.take(block)
        for (request, _), (tables, hashes, cached) in zip(moves, snapshots, strict=True):
            self.free(request)
            request.block_ids, request.block_hashes, request.num_cached_blocks = tables, hashes, cached

    # -- growth -------------------------------------------------------------------------------------------

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Makes room for the next `num_tokens`, recording what changed. False, with nothing changed but blocks
        that a window has passed, when the pool is short."""
        if num_tokens == 1 and self._holds_next(request):
            return True
        return self._allocate_groups(request, request.num_computed, request.num_computed + num_tokens)

    def _holds_next(self, request: Request) -> bool:
        """Whether the next token needs no change at all, as in most decode steps: in every group its block is
        there and writable, and no block has fallen out of the window."""
        start, is_writable = request.num_computed, self.pool.is_writable
        for group, table in zip(self.groups, request.block_ids, strict=True):
            size, window = group.block_size, group.window
            at = start // size
            if at >= len(table) or not is_writable(table[at]):
                return False
            if window is not None and start >= window:
                first = (start - window + 1) // size
                if first and table[first - 1] != NULL_BLOCK:
                    return False
        return True

    def _allocate_groups(self, request: Request, start: int, end: int) -> bool:
        wanted: list[tuple[int, int, int, list[int]]] = []  # group, table length, new blocks, indexes to copy
        total = 0
        for index, group in enumerate(self.groups):
            table = request.block_ids[index]
            self._release_passed(group, table, start)
            new = max(0, cdiv(end, group.block_size) - len(table))
            copied = [
                at
                for at in range(start // group.block_size, min(cdiv(end, group.block_size), len(table)))
                if not self.pool.is_writable(table[at])
            ]
            wanted.append((index, len(table), new, copied))
            total += new + len(copied)
        if total > self.pool.num_free:
            return False
        for index, length, new, copied in wanted:
            table = request.block_ids[index]
            for at in copied:
                self._copy_on_write(request, index, at)
            if new:
                blocks = self.pool.allocate(new)
                table.extend(blocks)
                self.changes.fresh.extend(blocks)
                if request.slot is not None:
                    for at, block in enumerate(blocks, start=length):
                        self.changes.new_blocks += (request.slot, index, at, block)
        return True

    def _copy_on_write(self, request: Request, index: int, at: int) -> None:
        table = request.block_ids[index]
        source, (copy,) = table[at], self.pool.allocate(1)
        self.changes.copies.append((source, copy))
        self.pool.release([source])
        table[at] = copy
        if request.slot is not None:
            self.changes.new_blocks += (request.slot, index, at, copy)

    def _release_passed(self, group: KVGroup, table: list[BlockId], start: int) -> None:
        """Gives back the blocks that no later token of the request sees. The workers' tables keep the old ids:
        the window's mask hides them."""
        if group.window is None:
            return
        for at in range(min(_first_visible(group, start), len(table)) - 1, -1, -1):
            if table[at] == NULL_BLOCK:
                break
            self.pool.release([table[at]])
            table[at] = NULL_BLOCK

    # -- completion ---------------------------------------------------------------------------------------

    def offer(self, request: Request) -> None:
        """Offers to the prefix cache what has become full. Steps run in launch order, so a block that a step
        in flight completes may be offered already: whoever reads it runs later."""
        if not self.prefix_caching:
            return
        complete = min(request.num_computed, request.num_known)
        hashes: list[bytes] | None = None
        for index, group in enumerate(self.groups):
            full, done = complete // group.block_size, request.num_cached_blocks[index]
            if full <= done:
                continue
            hashes = hashes or extend_hashes(request, self.hash_block_size)
            ratio = group.block_size // self.hash_block_size
            for at in range(done, full):
                block = request.block_ids[index][at]
                if block != NULL_BLOCK:
                    self.pool.offer(self._key(index, hashes[(at + 1) * ratio - 1]), block)
            request.num_cached_blocks[index] = full

    def completes(self, request: Request, num_tokens: int) -> list[bytes]:
        """Hashes of the blocks that computing so many more tokens makes full."""
        size = self.hash_block_size
        first, last = request.num_computed // size, min(request.num_computed + num_tokens, request.num_known) // size
        return extend_hashes(request, size)[first:last]

    def next_full(self, request: Request) -> bytes | None:
        """Hash of the first full block that a request has yet to compute; None: its tokens end before."""
        hashes, at = extend_hashes(request, self.hash_block_size), request.num_computed // self.hash_block_size
        return hashes[at] if at < len(hashes) else None

    def free(self, request: Request) -> None:
        """Releases everything, the sequence's end first, so that shared beginnings are evicted last."""
        for table in request.block_ids:
            self.pool.release(reversed(table))
        request.block_ids = []

    def drain_changes(self) -> BlockChanges:
        """The changes since the last drain."""
        changes, self.changes = self.changes, BlockChanges()
        return changes

    @staticmethod
    def _key(group: int, block_hash: bytes) -> bytes:
        return block_hash if group == 0 else block_hash + bytes([group])


def _first_visible(group: KVGroup, position: int) -> int:
    """Index of the first block that a token at `position` still sees."""
    return 0 if group.window is None else max(0, position - group.window + 1) // group.block_size


def blocks_per_request(groups: tuple[KVGroup, ...], length: int, max_step_tokens: int) -> int:
    """Most blocks that one request of `length` tokens holds at once, over all groups."""
    total = 0
    for group in groups:
        kept = length if group.window is None else min(length, group.window + max_step_tokens + group.block_size)
        total += cdiv(kept, group.block_size)
    return total
