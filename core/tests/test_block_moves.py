"""Copies of blocks that meet."""

from __future__ import annotations

import torch

from anychip.ops.reference import DenseCacheAttention, last_copies
from anychip.plugin_api import AttentionSpec


def test_of_copies_into_one_block_the_last_counts():
    assert last_copies([3, 3, 5, 1], [3, 4, 3, 4]) == ([5, 1], [3, 4])
    assert last_copies([], []) == ([], [])


def test_a_cache_is_never_written_twice_in_one_place():
    """A device with many threads would leave either."""
    written = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.__setitem__:
                written.append(args[1])
            return super().__torch_function__(func, types, args, kwargs or {})

    spec = AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=4, dtype="float32", kv_dtype="float32")
    cache = torch.randn(6, 2, 16, 2, 4)
    before = cache.clone()
    DenseCacheAttention(spec).copy_blocks(cache.as_subclass(Watched), [3, 3, 5], [3, 4, 3])
    assert written == [[3, 4]]
    assert cache[3].equal(before[5]) and cache[4].equal(before[3])
