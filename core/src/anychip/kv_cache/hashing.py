"""Chained block hashes: sha256 over the parent's hash, the block's tokens and the request's digests.

The digests (salt, and later adapter and media) enter the first block and reach the others through the chain. A prompt's
hashes are made where the prompt is tokenized, and travel with it; those of the output are made here as blocks fill.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from hashlib import sha256

from anychip.messages import KVGroup
from anychip.request import Request

HASH_BYTES = 32
_TOKEN_BYTES = 4
_BLOCKS_AT_A_TIME = 256
"""A thread that hashes a long prompt lets others run after so many blocks, some 0.2 ms."""


def finest_block_size(groups: Sequence[KVGroup]) -> int:
    """Tokens under one hash: the smallest block of any group."""
    return min(group.block_size for group in groups)


def root_hash(digests: Sequence[bytes]) -> bytes:
    """The parent hash of the first block. Requests that may share blocks have the same one."""
    outer = sha256()
    for digest in digests:
        outer.update(len(digest).to_bytes(8, "little"))
        outer.update(digest)
    return outer.digest()


def prompt_hashes(prompt: bytes, block_size: int, cache_salt: str) -> bytes:
    """The hashes of a prompt's full blocks, one after the other. `prompt`: int32 ids."""
    hashes = bytearray()
    parent, size = root_hash([cache_salt.encode()]), block_size * _TOKEN_BYTES
    for index in range(len(prompt) // size):
        parent = sha256(parent + prompt[index * size : (index + 1) * size]).digest()
        hashes += parent
        if index % _BLOCKS_AT_A_TIME == _BLOCKS_AT_A_TIME - 1:
            time.sleep(0)
    return bytes(hashes)


def extend_hashes(request: Request, block_size: int, num_blocks: int | None = None) -> list[bytes]:
    """Appends the missing hashes of the request's first `num_blocks` blocks, or of all that are full of known tokens,
    and returns all that there are."""
    hashes = request.block_hashes
    full = request.num_known // block_size
    if num_blocks is not None:
        full = min(full, num_blocks)
    if len(hashes) < full:
        parent = hashes[-1] if hashes else root_hash([request.cache_salt.encode()])
        for index in range(len(hashes), full):
            parent = sha256(parent + _tokens(request, index * block_size, (index + 1) * block_size)).digest()
            hashes.append(parent)
    return hashes


def _tokens(request: Request, start: int, end: int) -> bytes:
    """int32 ids of the known tokens from `start` to `end`."""
    num_prompt = request.num_prompt
    ids = request.prompt[start * _TOKEN_BYTES : end * _TOKEN_BYTES]
    if end > num_prompt:
        ids += array("i", request.output_token_ids[max(0, start - num_prompt) : end - num_prompt]).tobytes()
    return ids
