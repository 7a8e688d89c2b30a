"""The suite's sections for kernels, on the kernels in Triton's interpreter. What a whole model does there takes minutes
and runs by hand: `anychip conformance --device triton-interpreter --profile quick`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SAMPLING = (
    "sample.draw.001",
    "sample.distinct.001",
    "sample.ties.002",
    "sample.truncation.001",
    "sample.truncation.003",
)
SECTIONS = ("attn", "linear", "op", *SAMPLING)
SAMPLE = ("kv", "moe")
"""Judged in every run of the tests: interpreted, the others take minutes."""


@pytest.mark.parametrize(
    ("sections", "least"),
    [(SAMPLE, 60), pytest.param(SECTIONS, 100, marks=(pytest.mark.full, pytest.mark.timeout(1800)))],
)
def test_the_kernels_pass_the_suites_sections(tmp_path, sections, least):
    command = [sys.executable, "-m", "anychip.entrypoints.cli.main", "conformance", "--device", "triton-interpreter"]
    command += ["--profile", "quick", "--deadline-scale", "4", "--report", str(tmp_path)]
    for section in sections:
        command += ["--case", section]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    card = json.loads((tmp_path / "scorecard.json").read_text())
    passed = sum(counts.get("pass", 0) for counts in card["counts"].values())
    assert passed > least and card["evidence"] == "simulated" and card["failures"] == []


def test_pairs_are_sorted_by_expert_as_a_stable_sort_does():
    program = """
import anychip_triton.interpreter
import torch
from anychip_triton.kernels.routing import sort_pairs
torch.manual_seed(0)
for pairs, experts in ((1, 3), (65, 1), (300, 7), (90, 64)):
    ids = torch.randint(-1, experts, (pairs,), dtype=torch.int32)
    order = torch.full((pairs,), -7, dtype=torch.int32)
    ends, tiles = torch.empty(experts, dtype=torch.int32), torch.empty(experts, dtype=torch.int32)
    bins = 1 << experts.bit_length()
    sort_pairs[(experts,)](order, ends, tiles, ids, pairs, experts, BINS=bins, TILE=16, BLOCK=64, CHAINED=False)
    counts = torch.bincount(ids[ids >= 0].long(), minlength=experts)
    sorted_pairs = torch.where(ids < 0, experts, ids).argsort(stable=True)[: counts.sum()]
    assert ends.tolist() == counts.cumsum(0).tolist(), (pairs, experts)
    assert tiles.tolist() == ((counts + 15) // 16).cumsum(0).tolist(), (pairs, experts)
    assert order.tolist() == sorted_pairs.tolist() + [-7] * (pairs - int(counts.sum())), (pairs, experts)
print("sorted")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "sorted", done.stderr


def test_draws_over_many_parts_of_a_vocabulary_are_the_references():
    """With ties, tokens that masks exclude, and every kind of truncation beside rows without."""
    program = """
import anychip_triton.interpreter
import torch
from anychip.ops.reference import sampling as reference
from anychip_triton.launch import JitLauncher
from anychip_triton.ops import TritonOps
from anychip_triton.targets import INTERPRETER
from anychip_triton.tiles import TileTable

torch.manual_seed(0)
tile = {"block": 32, "ways": 4, "num_warps": 1}
ops = TritonOps(JitLauncher(INTERPRETER, TileTable("interpreter", {"sample": [tile]})))
rows = 12
given = {
    "temperature": torch.tensor([0.0, 0.3, 1.0, 2.0] * 3),
    "top_k": torch.tensor([0, 1, 5, 40, 1000, 0] * 2, dtype=torch.int32),
    "top_p": torch.tensor([1.0, 0.9, 0.5, 0.01, 0.999] * 3)[:rows],
    "min_p": torch.tensor([0.0, 0.0, 0.05, 0.5, 1.0, 0.0, 0.0] * 2)[:rows],
}
for vocab, spreads in ((7, (2.0,)), (106, (0.1, 20.0))):
    for spread in spreads:
        for name in ("seed_low", "seed_high", "sample_index", "position"):
            given[name] = torch.randint(-1000, 1000, (rows,), dtype=torch.int32)
        logits = torch.randn(rows, vocab) * spread
        logits[::3] = (logits[::3] * 2).round() / 2
        logits[1, ::2] = -torch.inf
        for all_greedy in (False, True):
            drawn, wanted = (each.sample(logits=logits, all_greedy=all_greedy, **given) for each in (ops, reference))
            assert drawn.equal(wanted), (vocab, spread, all_greedy, drawn, wanted)
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


def test_norms_and_activations_write_what_a_product_would_have_made_of_them():
    """To the bit: activations of 8 bits out of a norm, and a product of them, against the way over plain values."""
    program = """
from types import SimpleNamespace
import anychip_triton.interpreter
import torch
from anychip.plugin_api import LinearPart, LinearSpec, QuantScheme
from anychip_triton.formats import split_rows
from anychip_triton.launch import JitLauncher
from anychip_triton.linear import linear_kernel, quantized_activations
from anychip_triton.ops import TritonOps
from anychip_triton.targets import INTERPRETER
from anychip_triton.tiles import shipped_table
from anychip_triton.problems import storage

torch.manual_seed(0)
launch = JitLauncher(INTERPRETER, shipped_table("interpreter"))
ops, rows, width, outputs = TritonOps(launch), 3, 96, 32
for dtype in ("float32", "bfloat16"):
    for values, scales, activations, group in (
        ("fp8_e4m3", "channel", "token", None), ("int8", "channel", "token", None), ("fp8_e4m3", "block", "group", 32),
    ):
        scheme = QuantScheme(values=values, scales=scales, group_size=group, activations=activations)
        spec = LinearSpec(in_features=width, out_features=outputs, dtype=dtype, scheme=scheme,
                          parts=(LinearPart(name="w", offset=0, rows=outputs),))
        kernel = linear_kernel(spec, storage("cpu"), launch)
        packed = kernel.begin()
        bytes_ = torch.randint(0, 100, packed.matrix.values.shape, dtype=torch.uint8)
        packed.matrix.values.view(torch.uint8).copy_(bytes_)
        packed.matrix.scales.copy_(torch.rand(packed.matrix.scales.shape))
        assert kernel.accepts.scheme == scheme.name
        shapes = ((rows, width), (rows, width), (width,))
        x, residual, weight = (torch.randn(shape).to(getattr(torch, dtype)) for shape in shapes)
        gate_up = torch.randn(rows, 2 * width).to(x.dtype)
        for plain, fused in (
            (ops.residual_norm_quant(x=x, residual=residual, weight=weight, eps=1e-6)[0],
             ops.residual_norm_quant(x=x, residual=residual, weight=weight, eps=1e-6, out_format=kernel.accepts)[0]),
            (ops.gate_up_act_quant(gate_up=gate_up, activation="silu"),
             ops.gate_up_act_quant(gate_up=gate_up, activation="silu", out_format=kernel.accepts)),
        ):
            held, scale, _ = quantized_activations(launch, plain, packed.matrix)
            assert fused.stride(0) % 16 == 0
            values, scales_ = split_rows(fused, width, kernel.accepts)
            assert values.equal(held) and scales_.equal(scale), (dtype, name)
            assert kernel.apply(fused, packed).equal(kernel.apply(plain, packed)), (dtype, name)
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


def test_8_bit_floats_are_rounded_as_the_reference_does_and_have_no_negative_zero():
    program = """
import anychip_triton.interpreter
import torch
from anychip.ops.reference.quantized import to_fp8
from anychip_triton.kernels.matmul import quantize_rows
x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
x = x[x.isfinite()].view(1, -1)
out, one = torch.empty(x.shape, dtype=torch.uint8), torch.ones(1)
form = {"GROUP": x.numel(), "BLOCK": 2**16, "KIND": "fp8", "STATIC": True, "CHAINED": False}
quantize_rows[(1, 1)](out, one, x, x.numel(), 1, x.numel(), **form)
wanted = to_fp8(x.float()).view(torch.uint8)
assert (wanted == 0x80).any() and out.equal(wanted.masked_fill(wanted == 0x80, 0))
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


def test_a_process_that_has_compiled_kernels_does_not_interpret():
    program = """
import anychip_triton.kernels.attention
try:
    import anychip_triton.interpreter
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "needs a process of its own" in done.stdout, done.stderr


def test_bfloat16_is_rounded_as_devices_round_it():
    program = """
import torch
from anychip_triton.interpreter import _narrowed
values = torch.tensor([0.0, 1.0, 1.00390625, 1.01171875, -3.14159, 3.3895314e38, 1e-40])
for value in values:
    x = value.view(1)
    assert int(_narrowed(x.numpy())[0]) == int(x.bfloat16().view(torch.int16)) % 65536, value
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr
