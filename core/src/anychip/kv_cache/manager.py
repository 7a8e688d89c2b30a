"""Keeps every request's block tables: prefix hits, growth, windows, states, copy-on-write, forks.

Layers with one spec form a group; groups have a table each. Groups of tokens share a pool, and states have their own.
What is peculiar to a kind of group is in kv_cache/kinds. Does not choose victims: when blocks are short it says so and
the scheduler decides.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import msgspec

from anychip.kv_cache.block_pool import BlockPool, exceeds
from anychip.kv_cache.changes import BlockChanges
from anychip.kv_cache.checkpoints import Checkpoints
from anychip.kv_cache.hashing import extend_hashes, finest_block_size
from anychip.kv_cache.kinds import Growth, TokenBlocks, kind_of, token_groups
from anychip.kv_cache.sharing import Shared, find_fork, find_prefix, prefix_key
from anychip.request import Request
from anychip.types import NULL_BLOCK, BlockId
from anychip.worker_report import KVCacheConfig

_ALL_BLOCKS = _ALL_TOKENS = sys.maxsize

_OFFERED_AT_ONCE = 4
"""Blocks of a running request's output. Nobody asks for an answer's beginning meanwhile; at its end, all is offered."""


class KVCacheManager:
    """Owns the block tables of all requests. Without `prefix_caching` it offers and finds no prefix; forks share. Where
    a group keeps states, whose past is gone, `shares` is False: a sequence takes over only what a checkpoint ends.
    Where no layer keeps anything, there is no prefix caching."""

    def __init__(self, config: KVCacheConfig, *, prefix_caching: bool) -> None:
        self.groups = config.groups
        self.pool = BlockPool(config.num_blocks)
        """Of the groups of tokens."""
        self.states = BlockPool(config.num_states) if config.num_states else None
        self._pools = [self.pool] if self.states is None else [self.pool, self.states]
        tokens = token_groups(config.groups)
        assert tokens == list(config.groups[: len(tokens)]), "groups of tokens come before those of states"
        kinds = [kind_of(group) for group in config.groups]
        self._of_tokens = [kind for kind in kinds if isinstance(kind, TokenBlocks)]
        pools = [self.pool] * len(tokens) + self._pools[1:] * (len(config.groups) - len(tokens))
        self._groups = list(zip(kinds, pools, strict=True))
        self._block_sizes = [group.block_size for group in tokens]
        alone = len(kinds) == 1 and len(tokens) == 1 and tokens[0].window is None
        self._only_size = tokens[0].block_size if alone else 0  # 0: several groups, a window, or states
        self.shares = 0 < len(tokens) == len(config.groups)
        self.prefix_caching = prefix_caching and len(config.groups) > 0
        self.hash_block_size = finest_block_size(tokens)
        self.checkpoints: Checkpoints | None = None  # None: no states, or nothing that is kept of them
        if self.states is not None and prefix_caching:
            self.checkpoints = Checkpoints(self.states, len(config.groups), self.hash_block_size)
        self.offer_every = self.hash_block_size * _OFFERED_AT_ONCE  # tokens of output
        self._coarsest = max((group.block_size for group in tokens), default=self.hash_block_size)
        self.changes = BlockChanges()
        self.weights_version = 0
        for group in tokens:
            assert group.block_size % self.hash_block_size == 0, "block sizes divide each other"

    # -- admission ----------------------------------------------------------------------------------------

    def find_shared(self, request: Request) -> Shared:
        """What a waiting request need not compute: the prompt that it forks from, or the longest prefix on offer. At
        least one token is always left. Nothing is taken yet."""
        parent = request.fork_of
        if parent is None or parent.prefix_root != request.prefix_root:  # other weights computed the parent's prompt
            return self._find_prefix(request)
        fork = find_fork(self._of_tokens, parent) if self.shares else None
        if fork is None:
            return self._find_prefix(request)
        parent.next_change_at = 0  # its last block may be shared from now on
        return fork

    def enter(self, request: Request, shared: Shared, num_tokens: int) -> bool:
        """Gives a waiting request the blocks that it shares, and room for `num_tokens` more. False, with nothing
        changed, when a pool is short."""
        need = dict.fromkeys(self._pools, 0)
        for (kind, pool), table in zip(self._groups, shared.tables, strict=True):
            if pool is self.states:  # its own one, or a copy of the one that others hold
                need[pool] += 1
                continue
            new = kind.needed(shared.num_tokens + num_tokens) - len(table)
            # The block that it shares in part is copied.
            need[pool] += pool.count_free(table) + new + kind.num_partial(shared.num_tokens)
        if exceeds(need):
            return False
        self._share(request, shared)
        has_room = self.allocate(request, num_tokens)
        assert has_room, f"{request}: {need} blocks were counted, and there are fewer"
        return True

    def _find_prefix(self, request: Request) -> Shared:
        if not self.prefix_caching or request.needs_whole_prompt:
            return Shared(0, [[] for _ in self._groups])
        if self.checkpoints is not None:
            return self.checkpoints.find(self._of_tokens, self.pool, request)
        return find_prefix(self._of_tokens, self.pool, request, self.hash_block_size)

    def _share(self, request: Request, shared: Shared) -> None:
        for (_, pool), table in zip(self._groups, shared.tables, strict=True):
            pool.take(table)
        request.block_ids = shared.tables
        request.num_cached_blocks = [kind.num_full(shared.num_tokens) for kind, _ in self._groups]
        request.num_computed = shared.num_tokens
        if self.checkpoints is not None:
            self.checkpoints.remember(request)

    def adopt(self, moves: Sequence[tuple[Request, Request]]) -> None:
        """Each (request, source) gives the request the source's blocks in place of its own, all moves at once. The
        next to write a shared block copies it."""
        snapshots = [
            (
                [list(table) for table in source.block_ids],
                source.prefix_root,
                list(source.block_hashes),
                list(source.num_cached_blocks),
            )
            for _, source in moves
        ]
        for tables, *_ in snapshots:
            self.pool.take(chain.from_iterable(tables))
        for (request, source), (tables, root, hashes, cached) in zip(moves, snapshots, strict=True):
            self.free(request)
            request.block_ids, request.prefix_root = tables, root
            request.block_hashes, request.num_cached_blocks = hashes, cached
            source.next_change_at = 0

    def replace_tokens(self, request: Request) -> None:
        """The request's output is another one now. What it held goes back; where it held anything, it takes what the
        prefix cache offers of the new tokens."""
        del request.block_hashes[request.num_prompt // self.hash_block_size :]
        if request.block_ids:
            self.free(request)
            self._share(request, self._find_prefix(request))

    # -- growth -------------------------------------------------------------------------------------------

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Makes room for the next `num_tokens`, recording what changed. False, with nothing changed but blocks
        that a window has passed, when the pool is short. Its first `next_change_at` tokens need no more than
        it has: their blocks are there, and those that are still to be written are nobody else's. A window that passes a
        block meanwhile gives it back when a new one is needed, so a request never holds more for that."""
        start, end = request.num_computed, request.num_computed + num_tokens
        if end <= request.next_change_at:
            return True
        pool, tables, size = self.pool, request.block_ids, self._only_size
        if size and start <= request.next_change_at == len(tables[0]) * size and end <= request.next_change_at + size:
            if not pool.num_free:  # a block behind those that it has, which are its own: most calls
                return False
            self._append(request, 0, 1)
            request.next_change_at += size
            return True
        if not self._allocate_groups(request, start, end):
            return False
        request.next_change_at = min([-(-end // size) * size for size in self._block_sizes], default=_ALL_TOKENS)
        return True

    def _allocate_groups(self, request: Request, start: int, end: int) -> bool:
        growths: list[Growth] = []
        tokens = states = 0
        for (kind, pool), table in zip(self._groups, request.block_ids, strict=False):
            growth = new, copied = kind.grow(pool, table, start, end)
            growths.append(growth)
            if pool is self.states:
                states += new + len(copied)
            else:
                tokens += new + len(copied)
        if tokens > self.pool.num_free or (states and self.states is not None and states > self.states.num_free):
            return False
        for index, (new, copied) in enumerate(growths):
            for at in copied:
                self._copy_on_write(request, index, at)
            if new:
                self._append(request, index, new)
        return True

    def _append(self, request: Request, index: int, count: int) -> None:
        pool, table, slot = self._groups[index][1], request.block_ids[index], request.slot
        blocks = pool.allocate(count)
        if slot is not None:
            for at, block in enumerate(blocks, start=len(table)):
                self.changes.new_blocks += (slot, index, at, block)
        table += blocks
        if pool is self.pool:
            self.changes.fresh += blocks

    def _copy_on_write(self, request: Request, index: int, at: int) -> None:
        pool, table = self._groups[index][1], request.block_ids[index]
        source, (copy,) = table[at], pool.allocate(1)
        copies = self.changes.copies if pool is self.pool else self.changes.state_copies
        copies.append((source, copy))
        pool.release([source])
        table[at] = copy
        if request.slot is not None:
            self.changes.new_blocks += (request.slot, index, at, copy)

    def trim(self, request: Request) -> None:
        """Gives back the blocks behind the one that the request's next token needs. The workers' tables keep the old
        ids: no length reaches them."""
        for (kind, pool), table in zip(self._groups, request.block_ids, strict=True):
            needed = kind.needed(request.num_computed + 1)
            if len(table) > needed:
                pool.release(reversed(table[needed:]))
                del table[needed:]
                request.next_change_at = 0

    # -- completion ---------------------------------------------------------------------------------------

    def offer(self, request: Request) -> None:
        """Offers to the prefix cache what has become full. Steps run in launch order, so a block that a step
        in flight completes may be offered already: whoever reads it runs later."""
        if not self.prefix_caching:
            return
        complete = min(request.num_computed, request.num_known)
        hashes: list[bytes] | None = None
        for index, group in enumerate(self._of_tokens):
            size = group.block_size
            full, done = complete // size, request.num_cached_blocks[index]
            if full <= done:
                continue
            hashes = hashes or extend_hashes(request, self.hash_block_size)
            ratio = size // self.hash_block_size
            for at in range(done, full):
                block = request.block_ids[index][at]
                if block != NULL_BLOCK:
                    self.pool.offer(prefix_key(index, hashes[(at + 1) * ratio - 1]), block)
            request.num_cached_blocks[index] = full
        if self.checkpoints is not None:
            self.checkpoints.offer(request)

    def next_full(self, request: Request, num_tokens: int) -> tuple[int, bytes] | None:
        """Index, in hash blocks, and hash of the first block that computing so many more tokens makes full."""
        at = request.num_computed // self.hash_block_size
        end = min(request.num_computed + num_tokens, request.num_known)
        if not self.prefix_caching or end < (at + 1) * self.hash_block_size:
            return None
        return at, extend_hashes(request, self.hash_block_size, at + 1)[at]

    def shareable(self, request: Request, at: int) -> bytes | None:
        """Hash of one of a waiting request's blocks, by index in hash blocks, which it would share if it were on offer;
        None: it would compute it in any case."""
        usable = (request.num_known - 1) // self._coarsest * self._coarsest // self.hash_block_size
        if at >= usable or request.needs_whole_prompt:
            return None
        return extend_hashes(request, self.hash_block_size, at + 1)[at]

    def missing(self, request: Request, shared: int) -> bytes | None:
        """Key of what would have to be offered for a request to share more than `shared` tokens; None: nothing."""
        ratio = self._of_tokens[0].block_size // self.hash_block_size if self._of_tokens else 1
        at = (shared // self.hash_block_size // ratio + 1) * ratio - 1
        if not self.prefix_caching or at >= (request.num_known - 1) // self.hash_block_size:
            return None
        return extend_hashes(request, self.hash_block_size, at + 1)[at]

    def free(self, request: Request) -> None:
        """Releases everything, the sequence's end first, so that shared beginnings are evicted last."""
        for (_, pool), table in zip(self._groups, request.block_ids, strict=False):  # one that waits has no tables
            pool.release(reversed(table))
        request.block_ids = []
        request.next_change_at = 0
        if request.prefix_root.weights_version != self.weights_version:
            self._renew(request)

    # -- weights ------------------------------------------------------------------------------------------

    def weights_changed(self, requests: Iterable[Request]) -> None:
        """Nothing that is on offer is found any more. `requests` are all that have not ended: those that hold blocks
        keep them, and their old root, but offer none of them, for what they compute from now on builds on what other
        weights computed. The next time that they enter, they compute all of it anew."""
        self.weights_version += 1
        self.forget()
        for request in requests:
            if request.block_ids:
                request.num_cached_blocks = [_ALL_BLOCKS] * len(self.groups)
            else:
                self._renew(request)

    def _renew(self, request: Request) -> None:
        request.prefix_root = msgspec.structs.replace(request.prefix_root, weights_version=self.weights_version)
        request.block_hashes = []

    def forget(self) -> None:
        """Withdraws all that the prefix cache offers."""
        for pool in self._pools:
            pool.forget()

    # -- the pools ----------------------------------------------------------------------------------------

    @property
    def num_deferred(self) -> int:
        """Blocks of any pool that only steps in flight keep from being handed out."""
        return sum([pool.num_deferred for pool in self._pools])

    @property
    def num_returned(self) -> int:
        """Grows whenever a block of any pool becomes free."""
        return sum([pool.num_returned for pool in self._pools])

    def launched(self, step_id: int) -> None:
        """BlockPool.launched, of every pool."""
        for pool in self._pools:
            pool.launched(step_id)

    def retired(self, step_id: int) -> None:
        """BlockPool.retired, of every pool."""
        for pool in self._pools:
            pool.retired(step_id)

    # -- to the workers -----------------------------------------------------------------------------------

    def drain_changes(self) -> BlockChanges:
        """The changes since the last drain."""
        changes, self.changes = self.changes, BlockChanges()
        return changes

    def check_integrity(self, requests: Iterable[Request], others: Iterable[BlockId] = ()) -> None:
        """Raises AssertionError unless every block is free or held, and counted as often as `requests`, which are
        all that hold blocks, and `others` hold it. For tests."""
        held = [Counter(others), *(Counter[BlockId]() for _ in self._pools[1:])]
        for request in requests:
            for (_, pool), table in zip(self._groups, request.block_ids, strict=False):
                held[self._pools.index(pool)].update(table)
        for pool, blocks in zip(self._pools, held, strict=True):
            del blocks[NULL_BLOCK]
            pool.check_integrity(blocks)
