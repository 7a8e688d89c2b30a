"""Attention over tiles that lie within one block, over tiles that gather several, and by way of descriptors: all are
the reference's, whatever lies behind a row's end."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json
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

HEADS, KV_HEADS, DIM = 4, 2, 32


class Seeing(JitLauncher):
    described = None  # by which way the last tiles were read

    def __call__(self, *args, **told):
        self.described = told.get("DESCRIBED", self.described)
        super().__call__(*args, **told)


def judge(page, described, window):
    tile = {"block_m": 16, "block_n": 32, "num_warps": 1, "num_stages": 1, "described": described}
    tables = TileTable("interpreter", {"attention": [tile], "combine_splits": [{"num_warps": 1}]})
    spec = AttentionSpec(
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype="float32", kv_dtype="float32", window=window or None
    )
    launch = Seeing(INTERPRETER, tables)
    backend = TritonAttention(spec, launch)
    check(backend, page, [70, 64, 5], [1, 1, 1], DIM**-0.5)
    for scale in (-0.3, 0.0):
        check(backend, page, [40, 64], [7, 3], scale)
    check(backend, page, [77, 130, 64, 5], [20, 9, 33, 1], DIM**-0.5)
    return launch.described


def check(backend, page, lengths, counts, scale):
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
        wanted = attend_row(q[taken], k, v, backend.spec, scale=scale, sinks=None, slopes=None)
        torch.testing.assert_close(out[taken], wanted, rtol=2e-5, atol=2e-5)


torch.manual_seed(0)
print([judge(*way) for way in json.loads(sys.argv[1])])
"""


WAYS = {(16, 1, 0): False, (64, 0, 0): False, (32, 1, 0): True, (128, 1, 40): True}
"""Tokens of a block, whether descriptors are asked for, a window; and whether tiles of 32 keys come by descriptors."""


def test_tiles_read_by_any_way_give_what_the_reference_gives():
    command = [sys.executable, "-c", PROGRAM, json.dumps(list(WAYS))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == str(list(WAYS.values())), done.stdout + done.stderr[-3000:]
