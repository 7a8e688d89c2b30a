"""Chained block hashes: sha256 over the parent's hash, the block's tokens and the media that begin in the block.

What holds for the whole prompt is the first block's parent. A digest reaches every later block through the chain, so
prompts share the blocks before the first difference and none behind it. A prompt's hashes are made where the prompt is
tokenized, and travel with it; those of the output are made here as blocks fill.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from hashlib import sha256
from struct import Struct

from anychip.prefix import DIGEST_BYTES, MediaSpan, PrefixRoot
from anychip.request import Request
from anychip.worker_report import KVGroup

HASH_BYTES = 32
_TOKEN_BYTES = 4
_USUAL_BLOCK = 16
_BLOCKS_AT_A_TIME = 256
"""A thread that hashes a long prompt lets others run after so many blocks, some 0.2 ms."""
_ROOT = Struct("<?QQQ")
"""Whether there is an adapter, the bytes of its digest and of the salt, and the weights' version."""
_MARK = Struct(f"<QQ{DIGEST_BYTES}s")
"""A span that begins in a block: where in the block, how many tokens, and its digest. Of one size, so that what a
block's hash is over can be read in one way only."""


def finest_block_size(groups: Sequence[KVGroup]) -> int:
    """Tokens under one hash: the smallest block of any group; without groups, as many as if there was one."""
    return min((group.block_size for group in groups), default=_USUAL_BLOCK)


def root_hash(root: PrefixRoot) -> bytes:
    """The first block's parent. The lengths stand in front, so that no two roots are written with the same bytes."""
    adapter, salt = root.adapter or b"", root.salt.encode()
    lengths = _ROOT.pack(root.adapter is not None, len(adapter), len(salt), root.weights_version)
    return sha256(lengths + adapter + salt).digest()


def media_marks(media: Sequence[MediaSpan], block_size: int) -> dict[int, bytes]:
    """What the spans add to the hashes of the blocks that they begin in, by the blocks' indexes."""
    marks: dict[int, bytes] = {}
    for span in media:
        index, offset = divmod(span.start, block_size)
        marks[index] = marks.get(index, b"") + _MARK.pack(offset, span.length, span.digest)
    return marks


def prompt_hashes(prompt: bytes, block_size: int, root: PrefixRoot, media: Sequence[MediaSpan] = ()) -> bytes:
    """The hashes of a prompt's full blocks, one after the other. `prompt`: int32 ids."""
    hashes = bytearray()
    parent, size, marks = root_hash(root), block_size * _TOKEN_BYTES, media_marks(media, block_size)
    count = len(prompt) // size
    for first in range(0, count, _BLOCKS_AT_A_TIME):
        if first:
            time.sleep(0)
        for start in range(first * size, min(first + _BLOCKS_AT_A_TIME, count) * size, size):
            block = prompt[start : start + size]
            if marks:
                block += marks.get(start // size, b"")
            parent = sha256(parent + block).digest()
            hashes += parent
    return bytes(hashes)


def extend_hashes(request: Request, block_size: int, num_blocks: int | None = None) -> list[bytes]:
    """Appends the missing hashes of the request's first `num_blocks` blocks, or of all that are full of known tokens,
    and returns all that there are."""
    hashes = request.block_hashes
    full = (request.num_prompt + len(request.output_token_ids)) // block_size
    if num_blocks is not None:
        full = min(full, num_blocks)
    if len(hashes) < full:
        parent = hashes[-1] if hashes else root_hash(request.prefix_root)
        marks = request.media_marks
        for start in range(len(hashes) * block_size, full * block_size, block_size):
            block = _tokens(request, start, start + block_size)
            if marks:
                block += marks.get(start // block_size, b"")
            parent = sha256(parent + block).digest()
            hashes.append(parent)
    return hashes


def _tokens(request: Request, start: int, end: int) -> bytes:
    """int32 ids of the known tokens from `start` to `end`."""
    num_prompt = request.num_prompt
    if start >= num_prompt:  # most calls
        return array("i", request.output_token_ids[start - num_prompt : end - num_prompt]).tobytes()
    ids = request.prompt[start * _TOKEN_BYTES : end * _TOKEN_BYTES]
    if end > num_prompt:
        ids += array("i", request.output_token_ids[max(0, start - num_prompt) : end - num_prompt]).tobytes()
    return ids
