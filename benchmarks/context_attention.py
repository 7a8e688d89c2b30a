"""What a chunk of a prompt costs a rank of several contexts, beside a single rank's attention over all keys.

Every query is a row of its own over the rank's keys, where one rank takes a chunk's queries together. Both run in turns
on the CPU's kernels, with one thread and without the merge, whose time is that of the links.

    python benchmarks/context_attention.py [--contexts 2] [--turns 15] [--output benchmarks/results/cpu/contexts.json]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anychip.bench.report import write
from anychip.layers.context_parallel import ContextShare
from anychip.plugin_api import AttentionBackend, AttentionLayer, AttentionSpec, BatchView, ShapeKey
from anychip_conformance.device import open_device

SPEC = AttentionSpec(num_heads=16, num_kv_heads=4, head_dim=64, dtype="bfloat16", kv_dtype="bfloat16", lse=True)
BLOCK = 16
STEPS = {"decode 8 rows": (8, 1), "chunk of 64": (1, 64), "chunk of 512": (1, 512)}
"""Rows, and new tokens of each."""
CONTEXTS = (512, 4096)


def batch(rows: int, new: int, length: int, block_size: int) -> BatchView:
    pages = -(-length // block_size)
    table = torch.arange(1, 1 + rows * pages, dtype=torch.int32).view(rows, pages)
    positions = torch.arange(length - new, length).repeat(rows)
    slots = table.repeat_interleave(new, 0)[torch.arange(rows * new), positions // block_size] * block_size
    return BatchView(
        query_start=torch.arange(0, rows * new + 1, new, dtype=torch.int32),
        seq_lens=torch.full((rows,), length, dtype=torch.int32),
        block_table=table,
        slot_mapping=slots + positions % block_size,
        positions=positions.int(),
        num_reqs=rows,
        num_tokens=rows * new,
        max_query_len=new,
        block_size=block_size,
        host_query_lens=np.full(rows, new, dtype=np.int32),
        host_seq_lens=None,
        host_exact=False,
    )


def timed(backend: AttentionBackend, view: BatchView, num_blocks: int) -> Callable[[], float]:
    """Seconds of one layer's attention with a plan of its own, as a step of one layer has it."""
    layer = AttentionLayer(index=0, scale=0.125, ops=None)  # type: ignore[arg-type]
    raw = torch.zeros(num_blocks * backend.kv_layout().page_bytes(view.block_size), dtype=torch.uint8)
    cache = backend.make_cache(raw, num_blocks, view.block_size)
    q, k, v = (torch.randn(view.num_tokens, heads, 64).bfloat16() for heads in (16, 4, 4))
    shape = ShapeKey(
        num_tokens=view.num_tokens, num_reqs=view.num_reqs, num_samples=1, max_query_len=view.max_query_len, num_pages=0
    )

    def once() -> float:
        began = time.perf_counter()
        backend.forward_with_lse(q, k, v, cache, backend.plan(view, shape, group=0), layer)
        return time.perf_counter() - began

    return once


def measure(contexts: int, turns: int) -> dict[str, Any]:
    backend = open_device("cpu", {"threads": "1"}).platform.attention(SPEC)
    found: dict[str, Any] = {}
    for name, (rows, new) in STEPS.items():
        for length in CONTEXTS:
            whole = batch(rows, new, length, BLOCK * contexts)
            mine = ContextShare(size=contexts, rank=0, block_size=BLOCK).view(whole)
            alone = batch(rows, new, length, BLOCK)
            one = timed(backend, alone, 1 + int(alone.block_table.max()))
            part = timed(backend, mine, 1 + int(whole.block_table.max()))
            taken = [(one(), part()) for _ in range(turns + 2)][2:]
            found[f"{name}, {length} keys"] = {
                "ms_one_rank": round(statistics.median(a for a, _ in taken) * 1e3, 3),
                "ms_a_context": round(statistics.median(b for _, b in taken) * 1e3, 3),
                "ratio": round(statistics.median(b / a for a, b in taken), 3),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=2)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.contexts, arguments.turns)
    for name, values in found.items():
        print(f"{name:28}{values}")
    if arguments.output is not None:
        write(arguments.output, {"benchmark": "context_attention", "contexts": arguments.contexts, **found})


if __name__ == "__main__":
    main()
