"""Adapters behind products: what the kernels add, in tiles of sorted tokens, is what the reference adds. The suite's
cases have few tokens, each a tile of its own."""

from __future__ import annotations

import subprocess
import sys


def test_sorted_tokens_of_several_adapters_get_what_the_reference_adds():
    program = """
import anychip_triton.interpreter
import torch
from anychip.ops.reference import add_low_rank, blank_stacks, write_adapters
from anychip.plugin_api import AdaptedPart, AdapterEntry, AdapterSite, LowRank, Span
from anychip_triton.launch import JitLauncher
from anychip_triton.low_rank import TritonLowRank
from anychip_triton.targets import INTERPRETER
from anychip_triton.tiles import shipped_table

torch.manual_seed(0)
op = TritonLowRank(JitLauncher(INTERPRETER, shipped_table("interpreter"))).add_low_rank
tokens, columns, rows, max_rank = 90, 70, (130, 24), 80
for dtype, bound in (("float32", 2e-4), ("bfloat16", 4e-2)):
    kind = getattr(torch, dtype)
    parts = tuple(AdaptedPart(module=str(i), rows=n, held=Span(0, n), offset=130 * i) for i, n in enumerate(rows))
    site = AdapterSite(
        index=0, in_features=columns, columns=Span(0, columns), out_features=154, parts=parts, dtype=dtype
    )
    (stack,) = blank_stacks([site], 5, max_rank, lambda shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype)))
    for slot, ranks in enumerate(((1, 80), (16, 0), (0, 0), (64, 3), (5, 17))):
        modules = {str(i): LowRank(torch.randn(r, columns).to(kind) / 8, torch.randn(n, r).to(kind) / 8, 1.5)
                   for i, (r, n) in enumerate(zip(ranks, rows)) if r}
        write_adapters([stack], [site], [AdapterEntry(slot, modules)])
    slots = torch.randint(-1, 5, (tokens,), dtype=torch.int32)
    slots[slots == 1] = 3  # nobody has it
    x, y = torch.randn(tokens, columns).to(kind), torch.randn(tokens, 154).to(kind)
    wanted = add_low_rank(x=x, y=y, stack=stack, slots=slots)
    found = op(x=x, y=y.clone(), stack=stack, slots=slots)
    assert found[slots < 0].equal(y[slots < 0]), "a token without an adapter"
    assert not wanted.equal(y) and (found - wanted).abs().max() <= bound * wanted.abs().max(), dtype
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr
