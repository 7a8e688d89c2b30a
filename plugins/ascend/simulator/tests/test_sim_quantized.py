"""Quantized products and quantization of the simulator, against exact integers and float64."""

from __future__ import annotations

import pytest

pytest.importorskip("anychip_npu_simulator.runtime", reason="needs torch_npu: make ascend-test", exc_type=ImportError)

import torch
import torch_npu
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bytes_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def near(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert float((got.cpu().double() - wanted).abs().max()) <= TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("smooth", [False, True])
def test_dynamic_quant_makes_the_largest_of_a_row_127(dtype, smooth):
    x = drawn(2, 3, 16, dtype=dtype)
    x[0, 1] = 0
    factors = drawn(16, dtype=dtype, seed=1).abs() if smooth else None
    y, scale = torch_npu.npu_dynamic_quant(x.npu(), smooth_scales=None if factors is None else factors.npu())
    wide = x.double() if factors is None else x.double() * factors.double()
    assert y.dtype == torch.int8 and tuple(scale.shape) == (2, 3)
    back = y.cpu().double() * scale.cpu().double()[..., None]
    assert bool(((back - wide).abs() <= scale.cpu().double()[..., None] * 0.501).all())
    assert int(y.abs().max()) == 127 and bool((y[0, 1] == 0).all())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("nz", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
def test_quant_matmul_scales_exact_sums(dtype, nz, by_token):
    torch.npu.config.allow_internal_format = True
    x, weight = bytes_of(5, 64), bytes_of(64, 32, seed=1)
    scale, tokens = drawn(32, seed=2).abs() * 1e-3, drawn(5, seed=3).abs() * 1e-2
    bias = torch.randint(-1000, 1000, (32,), dtype=torch.int32, generator=torch.Generator().manual_seed(4))
    held = torch_npu.npu_format_cast(weight.npu(), 29) if nz else weight.npu()
    got = torch_npu.npu_quant_matmul(
        x.npu(),
        held,
        scale.npu(),
        pertoken_scale=tokens.npu() if by_token else None,
        bias=bias.npu(),
        output_dtype=dtype,
    )
    wanted = (x.double() @ weight.double() + bias.double()) * scale.double()
    near(got, wanted * tokens.double()[:, None] if by_token else wanted, dtype)


def test_quant_matmul_gives_integers():
    x, weight = bytes_of(3, 32), bytes_of(32, 8, seed=1)
    got = torch_npu.npu_quant_matmul(x.npu(), weight.npu(), torch.ones(1).npu(), output_dtype=torch.int32)
    assert torch.equal(got.cpu(), (x.double() @ weight.double()).int())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("offset", [False, True])
def test_weight_quant_batchmatmul(dtype, bits, group, offset):
    k, n = 96, 16
    x = drawn(4, k, dtype=dtype)
    high = 1 << (bits - 1)
    weight = torch.randint(-high, high, (k, n), generator=torch.Generator().manual_seed(1))
    scale = (drawn(-(-k // group) if group else 1, n, seed=2).abs() * 0.02).to(dtype)
    shift = torch.randint(-3, 4, scale.shape, generator=torch.Generator().manual_seed(3)).to(dtype) if offset else None
    held = weight.to(torch.int8).npu() if bits == 8 else torch_npu.npu_convert_weight_to_int4pack(weight.int().npu())
    bias = drawn(n, dtype=torch.float32 if dtype == torch.bfloat16 else dtype, seed=4)
    got = torch_npu.npu_weight_quant_batchmatmul(
        x.npu(), held, scale.npu(), antiquant_offset=None if shift is None else shift.npu(), bias=bias.npu(),
        antiquant_group_size=group,
    )  # fmt: skip
    rows = torch.arange(k) // group if group else torch.zeros(k, dtype=torch.long)
    wide = (weight.double() + (shift.double()[rows] if offset else 0)) * scale.double()[rows]
    near(got, x.double() @ wide + bias.double(), dtype)


def test_a_transposed_packed_weight_is_packed_along_its_rows():
    x, weight = (
        drawn(2, 64, dtype=torch.float16),
        torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(1)),
    )
    packed = torch_npu.npu_convert_weight_to_int4pack(weight.int().npu())  # [n, k / 8]
    scale = torch.full((1, 16), 0.05, dtype=torch.float16)
    got = torch_npu.npu_weight_quant_batchmatmul(x.npu(), packed.t(), scale.npu())
    near(got, x.double() @ weight.double().T * 0.05, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("split", [1, 2])
def test_transpose_batchmatmul(dtype, split):
    x, weight = drawn(5, 4, 16, dtype=dtype), drawn(4, 16, 8, dtype=dtype, seed=1)
    got = torch_npu.npu_transpose_batchmatmul(
        x.npu(), weight.npu(), perm_x1=[1, 0, 2], perm_y=[1, 0, 2], batch_split_factor=split
    )
    wanted = torch.stack([x[:, b].double() @ weight[b].double() for b in range(4)], 1)  # [m, batch, n]
    if split == 2:
        wanted = torch.stack([wanted[:, half * 2 : half * 2 + 2].flatten(1) for half in range(2)])
    near(got, wanted, dtype)
