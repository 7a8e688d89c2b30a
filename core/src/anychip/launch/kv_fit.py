"""Whether the KV cache holds one request of the model's length, and the longest that it does hold."""

from __future__ import annotations

import sys

from anychip.errors import KVCacheTooSmall
from anychip.kv_cache.kinds import blocks_per_request, token_groups
from anychip.types import cdiv
from anychip.worker_report import KVCacheConfig, MemoryPlan, WorkerReady

_GIB = 1 << 30


def check_fits(ready: WorkerReady, max_model_len: int, max_step_tokens: int) -> None:
    """Raises KVCacheTooSmall when the cache cannot hold one request of the model's length."""
    need = blocks_per_request(ready.kv.groups, max_model_len, max_step_tokens)
    have = ready.kv.num_blocks - 1
    if need > have:
        fits = longest_that_fits(ready.kv, max_step_tokens)
        raise KVCacheTooSmall(
            f"one request of {max_model_len} tokens needs {need} KV blocks, {have} fit; lower --max-model-len to "
            f"{fits}, or give the cache {cdiv(need * ready.memory.kv_cache, max(1, have))} bytes with "
            f"--kv-cache-bytes (now {ready.memory.kv_cache}){_division(ready.memory)}"
        )


def _division(memory: MemoryPlan) -> str:
    """What takes the device's memory beside the cache, where the device says how much it has."""
    if not memory.usable:
        return ""
    parts = {
        "weights": memory.weights,
        "the largest step": memory.activations,
        "graphs": memory.graphs,
        "other processes, the driver and its libraries": memory.elsewhere,
    }
    taken = ", ".join(f"{name} {nbytes / _GIB:.1f}" for name, nbytes in parts.items())
    return f"; of the {memory.usable / _GIB:.1f} GiB that --memory-fraction allows, in GiB: {taken}"


def longest_that_fits(kv: KVCacheConfig, max_step_tokens: int) -> int:
    """The longest request, in tokens, whose blocks the cache holds. A state holds any number of them."""
    sizes = [group.block_size for group in token_groups(kv.groups)]
    low, high = 0, max(sizes) * kv.num_blocks if sizes else sys.maxsize
    while low < high:
        middle = (low + high + 1) // 2
        if blocks_per_request(kv.groups, middle, max_step_tokens) <= kv.num_blocks - 1:
            low = middle
        else:
            high = middle - 1
    return low
