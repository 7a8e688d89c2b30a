"""Norms, rotary embedding, activations and sampling of the simulator, against float64 element by element."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("anychip_npu_simulator.runtime", reason="needs torch_npu: make ascend-test", exc_type=ImportError)

import torch
import torch_npu
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of one rounding, relative to the largest value."""


def near(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    got, wanted = got.cpu().double(), wanted.double()
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()))


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    reverse = torch.tensor([1 / math.sqrt(sum(v * v for v in row) / len(row) + epsilon) for row in x.double().tolist()])
    return x.double() * reverse[:, None].double() * gamma.double(), reverse[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 64), (3, 130)])
def test_rms_norm(dtype, shape):
    x, gamma = drawn(*shape, dtype=dtype), drawn(shape[1], dtype=dtype, seed=1)
    y, reverse = torch_npu.npu_rms_norm(x.npu(), gamma.npu(), 1e-5)
    wanted, inverse = rms(x, gamma, 1e-5)
    near(y, wanted, dtype)
    near(reverse, inverse, torch.float32)
    assert y.dtype == dtype and reverse.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_gives_the_sum_as_well(dtype):
    x, residual, gamma = drawn(4, 48, dtype=dtype), drawn(4, 48, dtype=dtype, seed=1), drawn(48, dtype=dtype, seed=2)
    y, _, total = torch_npu.npu_add_rms_norm(x.npu(), residual.npu(), gamma.npu(), 1e-6)
    near(total, x.double() + residual.double(), dtype)
    near(y, rms(total.cpu(), gamma, 1e-6)[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotary_mul_turns_pairs(dtype, mode):
    x, angle = (
        drawn(1, 5, 3, 16, dtype=dtype),
        torch.rand(5, 8, generator=torch.Generator().manual_seed(3)).double() * 6,
    )
    pairs = torch.cat((angle, angle), -1) if mode == "half" else angle.repeat_interleave(2, -1)
    cos, sin = (f(pairs).view(1, 5, 1, 16).to(dtype) for f in (torch.cos, torch.sin))
    got = torch_npu.npu_rotary_mul(x.npu(), cos.npu(), sin.npu(), mode)
    wanted = torch.empty(x.shape, dtype=torch.float64)
    for s in range(5):
        for i in range(8):
            a, b = (i, i + 8) if mode == "half" else (2 * i, 2 * i + 1)
            c, z = float(cos[0, s, 0, a]), float(sin[0, s, 0, a])
            left, right = x[0, s, :, a].double(), x[0, s, :, b].double()
            wanted[0, s, :, a] = left * c - right * z
            wanted[0, s, :, b] = right * float(cos[0, s, 0, b]) + left * float(sin[0, s, 0, b])
    near(got, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activations(dtype):
    x = drawn(6, 32, dtype=dtype)
    left, right = x.double()[:, :16], x.double()[:, 16:]
    near(torch_npu.npu_swiglu(x.npu()), left / (1 + torch.exp(-left)) * right, dtype)
    erf = torch.tensor([[0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in left.tolist()]).double()
    near(torch_npu.npu_gelu_mul(x.npu()), erf * right, dtype)
    tanh = 0.5 * left * (1 + torch.tanh(math.sqrt(2 / math.pi) * (left + 0.044715 * left**3)))
    near(torch_npu.npu_gelu(x[:, :16].npu(), approximate="tanh"), tanh, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_top_k_top_p_keeps_what_a_loop_keeps(dtype):
    logits = drawn(4, 20, dtype=dtype) * 2
    ks, ps = [3, 20, 1, 7], [0.9, 0.5, 1.0, 0.3]
    got = torch_npu.npu_top_k_top_p(
        logits.npu(), torch.tensor(ps, dtype=dtype).npu(), torch.tensor(ks, dtype=torch.int32).npu()
    ).cpu()
    for row, (k, p) in enumerate(zip(ks, ps, strict=True)):
        order = sorted(range(20), key=lambda i: -float(logits[row, i]))[:k]
        weights = [math.exp(float(logits[row, i])) for i in order]
        kept, above = set(), 0.0
        for i, weight in zip(order, weights, strict=True):
            if not kept or above < p * sum(weights):
                kept.add(i)
            above += weight
        assert set(got[row].isfinite().nonzero().flatten().tolist()) == kept
        assert torch.equal(got[row, sorted(kept)], logits[row, sorted(kept)])
