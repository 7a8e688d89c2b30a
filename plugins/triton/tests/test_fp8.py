"""8-bit floats for matrix units whose kind of them has another bias than checkpoints'."""

from __future__ import annotations

import pytest
import torch

from anychip.plugin_api import LinearPart, LinearSpec, MoESpec, QuantScheme
from anychip_triton.ahead import RecordingLauncher
from anychip_triton.linear import linear_kernel
from anychip_triton.moe import TritonMoE
from anychip_triton.problems import storage
from anychip_triton.targets import TARGETS

FP8 = QuantScheme(values="fp8_e4m3", scales="channel", activations="token")
ALL = torch.arange(256, dtype=torch.int32).to(torch.uint8)
NEGATIVE_ZERO = 0x80


def test_the_same_bits_are_half_as_much():
    fn, fnuz = (ALL.view(kind).float() for kind in (torch.float8_e4m3fn, torch.float8_e4m3fnuz))
    numbers = fn.isfinite() & (ALL != NEGATIVE_ZERO)
    assert numbers.sum() == 253 and fn[numbers].equal(2 * fnuz[numbers])
    assert fnuz[NEGATIVE_ZERO].isnan()


@pytest.mark.parametrize(("target", "changed"), [("gfx942", True), ("gfx950", False), ("sm_90", False)])
def test_weights_are_kept_without_negative_zeros_where_those_are_no_number(target, changed):
    launch = RecordingLauncher(TARGETS[target])
    weight = ALL.view(1, 256).view(torch.float8_e4m3fn)
    spec = LinearSpec(
        in_features=256, out_features=1, parts=(LinearPart(name="w", offset=0, rows=1),), dtype="bfloat16", scheme=FP8
    )
    linear = linear_kernel(spec, storage("cpu"), launch)
    packed = linear.begin()
    linear.load(packed, "w", weight)
    experts = TritonMoE(
        MoESpec(num_experts=1, top_k=1, hidden_size=256, intermediate_size=1, dtype="bfloat16", scheme=FP8),
        storage("cpu"), launch,
    )  # fmt: skip
    stacked = experts.begin()
    experts.load(stacked, 0, "gate", weight)
    wanted = ALL.clone()
    if changed:
        wanted[NEGATIVE_ZERO] = 0
    for held in (packed.matrix.values[0], stacked.gate_up.values[0]):
        assert held.view(torch.uint8).equal(wanted)
    assert weight.view(torch.uint8).equal(ALL.view(1, 256)), "the caller's tensor is its own"


def test_float32_is_not_multiplied_in_units_that_add_in_fewer_bits():
    launch = RecordingLauncher(TARGETS["sm_90"])
    for dtype, units in (("float32", ""), ("bfloat16", "fn")):
        spec = LinearSpec(
            in_features=64, out_features=32, parts=(LinearPart(name="w", offset=0, rows=32),), dtype=dtype, scheme=FP8
        )
        kernel = linear_kernel(spec, storage("meta"), launch)
        kernel.apply(torch.empty(3, 64, dtype=getattr(torch, dtype), device="meta"), kernel.begin())
        assert launch.launches[-1].arguments["FP8"] == units
