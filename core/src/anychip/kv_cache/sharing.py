"""Finds the blocks that an entering request can share: the longest prefix on offer, or the prompt of its fork's parent.
Looks only; nothing is taken."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from anychip.kv_cache.block_pool import BlockPool
from anychip.kv_cache.hashing import extend_hashes
from anychip.kv_cache.kinds import TokenBlocks
from anychip.request import Request
from anychip.types import NULL_BLOCK, BlockId


class Shared(NamedTuple):
    """Tokens that need no computing, and the blocks that hold them, by KV group."""

    num_tokens: int
    tables: list[list[BlockId]]


def prefix_key(group: int, block_hash: bytes) -> bytes:
    """The key under which the prefix cache offers a group's block."""
    return block_hash if group == 0 else block_hash + bytes([group])


def find_fork(groups: Sequence[TokenBlocks], parent: Request) -> Shared | None:
    """The parent's prompt, all but its last token, which the child computes to sample from. None where it is not
    computed yet, or the parent's window has moved past its end."""
    shared = parent.num_prompt - 1
    if shared < 1 or not parent.block_ids or parent.num_computed < parent.num_prompt:
        return None
    tables = []
    for group, held in zip(groups, parent.block_ids, strict=True):
        first, last = group.first_visible(shared), group.needed(shared)
        if len(held) < last or NULL_BLOCK in held[first:last]:
            return None
        tables.append([NULL_BLOCK] * first + held[first:last])
    return Shared(shared, tables)


def find_prefix(
    groups: Sequence[TokenBlocks],
    pool: BlockPool,
    request: Request,
    hash_block_size: int,
    limit: int = sys.maxsize,
) -> Shared:
    """The longest prefix that every group can offer, at least one token short of what is known, of `limit` tokens at
    most."""
    length = min(limit, (request.num_known - 1) // hash_block_size * hash_block_size)
    tables: list[list[BlockId]] = []
    while length and len(tables) < len(groups):
        index = len(tables)
        table = _offered(index, groups[index], pool, request, hash_block_size, length)
        offered = len(table) * groups[index].block_size
        if offered < length:
            # The groups before must hold it too: a full one does, and a window may need other blocks.
            length, tables = offered, [] if index else tables
            if index:
                continue
        tables.append(table)
    return Shared(length, tables) if length else Shared(0, [[] for _ in groups])


def _offered(
    index: int, group: TokenBlocks, pool: BlockPool, request: Request, hash_block_size: int, limit: int
) -> list[BlockId]:
    """The blocks of the longest prefix up to `limit` tokens that one group can offer. A windowed group needs only the
    blocks that the next token still sees."""
    hashes, ratio, whole = request.block_hashes, group.block_size // hash_block_size, group.whole
    table: list[BlockId] = []
    best = run = 0
    for block in range(limit // group.block_size):
        at = (block + 1) * ratio - 1
        if at >= len(hashes):  # made as the search goes: one that misses early makes few
            extend_hashes(request, hash_block_size, at + 1)
        found = pool.find(hashes[at] if index == 0 else prefix_key(index, hashes[at]))
        if found is None:
            if whole:
                break
            run = 0
            table.append(NULL_BLOCK)
            continue
        table.append(found)
        run += 1
        if whole or run >= block + 1 - group.first_visible((block + 1) * group.block_size):
            best = block + 1
    first = group.first_visible(best * group.block_size)
    return [NULL_BLOCK] * first + table[first:best]
