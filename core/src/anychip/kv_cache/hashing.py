"""Chained block hashes: sha256 over the parent's hash, the block's tokens and the request's digests.

The digests (salt, and later adapter and media) enter the first block and reach the others through the chain.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256

from anychip.request import Request


def root_hash(digests: Sequence[bytes]) -> bytes:
    """What the first block's parent is: the same for requests that may share."""
    outer = sha256()
    for digest in digests:
        outer.update(len(digest).to_bytes(8, "little"))
        outer.update(digest)
    return outer.digest()


def extend_hashes(request: Request, block_size: int) -> list[bytes]:
    """Appends the hashes of the request's full known blocks that are missing, and returns all of them."""
    hashes = request.block_hashes
    full = request.num_known // block_size
    if len(hashes) < full:
        parent = hashes[-1] if hashes else root_hash([request.cache_salt.encode()])
        for index in range(len(hashes), full):
            tokens = request.token_ids[index * block_size : (index + 1) * block_size]
            parent = sha256(parent + array("i", tokens).tobytes()).digest()
            hashes.append(parent)
    return hashes
