"""Attention over tiles that lie within one block, over tiles that gather several, and by way of descriptors: all are
the reference's, whatever lies behind a row's end."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import anychip_triton.interpreter
import torch
from types import SimpleNamespace
from anychip.ops.reference import attend_row
from anychip.plugin_api import AttentionLayer, AttentionSpec
from anychip_triton.attention import TritonAttention, TritonPlan
from anychip_triton.launch import JitLauncher
from anychip_triton.targets import INTERPRETER
from anychip_triton.tiles import TileTable

page, described, window = map(int, sys.argv[1:])
HEADS, KV_HEADS, DIM = 4, 2, 32
tile = {"block_m": 16, "block_n": 32, "num_warps": 1, "num_stages": 1, "described": described}
tables = TileTable("interpreter", {"attention": [tile], "combine_splits": [{"num_warps": 1}]})
spec = AttentionSpec(
    num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype="float32", kv_dtype="float32", window=window or None
)
seen = []


class Seeing(JitLauncher):
    def __call__(self, *args, **told):
        seen.append(told.get("DESCRIBED"))
        super().__call__(*args, **told)


backend = TritonAttention(spec, Seeing(INTERPRETER, tables))
torch.manual_seed(0)


def check(lengths, counts, scale):
    pages = [-(-length // page) for length in lengths]
    blocks = torch.randperm(sum(pages)).int().split(pages)
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    cache = torch.randn(sum(pages), 2, page, KV_HEADS, DIM)
    for row, (length, own) in enumerate(zip(lengths, blocks)):
        table[row, : len(own)] = own
        if length % page:
            cache[own[-1].long(), :, length % page :] = float("nan")
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    q = torch.randn(sum(counts), HEADS, DIM)
    plan = TritonPlan(starts, torch.tensor(lengths).int(), table, None, None, page, max(counts) == 1)
    layer = AttentionLayer(index=0, scale=scale, ops=SimpleNamespace())
    out = backend.attend(q, cache, plan, layer, out=torch.full_like(q, float("nan")))
    for row, (length, own) in enumerate(zip(lengths, blocks)):
        k, v = (cache[own.long(), half].flatten(0, 1)[:length] for half in (0, 1))
        taken = slice(starts[row], starts[row + 1])
        wanted = attend_row(q[taken], k, v, spec, scale=scale, sinks=None, slopes=None)
        torch.testing.assert_close(out[taken], wanted, rtol=2e-5, atol=2e-5)


for scale in (DIM**-0.5, -0.3, 0.0):
    check([77, 130, 64, 5], [50, 20, 64, 1], scale)
    check([77, 130, 64, 5], [1, 1, 1, 1], scale)
print(any(seen))
"""


@pytest.mark.parametrize(
    ("page", "described", "window", "by_descriptor"),
    [(16, 1, 0, False), (32, 0, 0, False), (32, 1, 0, True), (64, 1, 0, True), (64, 0, 40, False), (128, 1, 40, True)],
)
def test_tiles_read_by_any_way_give_what_the_reference_gives(page, described, window, by_descriptor):
    command = [sys.executable, "-c", PROGRAM, str(page), str(described), str(window)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == str(by_descriptor), done.stdout + done.stderr[-3000:]
