"""Activations of eight bits: experts whose products take them, and the ops before a product that make them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from anychip_conformance.case import kind
from anychip_conformance.cases import test_linear, test_moe
from anychip_conformance.cases.test_linear import LinearCase
from anychip_conformance.cases.test_moe import MoECase
from anychip_conformance.device import Device, seen
from anychip_conformance.oracle import vectorised as oracle
from anychip_conformance.oracle.rounding import rounded
from anychip_conformance.oracle.vectorised import Bounded
from anychip_conformance.products import Scheme, scheme_slack

_EPS = 1e-5
SCHEMES = (
    Scheme(name="fp8", scales="channel", activations="token"),
    Scheme(name="fp8", scales="block", group_size=16, activations="group"),
    Scheme(name="int8-w8a8", scales="channel", activations="token"),
)


@kind(
    "moe.activations",
    profile="quantization",
    corpus=[
        MoECase(scheme=scheme, tokens=tokens, dtype=dtype, hidden=32, intermediate=48, bias=tokens == 1)  # type: ignore[arg-type]
        for scheme in SCHEMES
        for tokens in (1, 12)
        for dtype in ("any", "narrow")
    ],
    drawn=st.builds(
        MoECase,
        scheme=st.sampled_from(SCHEMES),
        tokens=st.sampled_from([1, 2, 7, 33]),
        top_k=st.integers(1, 4),
        hidden=st.just(32),
        intermediate=st.sampled_from([16, 48]),
        dtype=st.sampled_from(["any", "narrow"]),
        seed=st.integers(0, 2**16),
    ),
    examples=20,
)
def experts(device: Device, case: MoECase) -> None:
    """Experts of fp8, and of int8 with int8 activations: each token's activations are rounded by a scale of their own,
    before gate and up and again before down."""
    test_moe.check(device, case)


@kind(
    "linear.fused_activations",
    profile="quantization",
    corpus=[
        LinearCase(tokens=tokens, columns=64, rows=(48, 16), scheme=scheme, dtype=dtype)  # type: ignore[arg-type]
        for scheme in SCHEMES
        for tokens in (1, 9)
        for dtype in ("any", "narrow")
    ],
)
def fused(device: Device, case: LinearCase) -> None:
    """A norm and an activation give what the product behind them asks for, in the format that its kernel accepts, and
    the product of that is right."""
    loaded, ops = test_linear.Loaded(device, case), device.ops.ops
    wanted, rng = loaded.kernel.accepts, np.random.default_rng(case.seed)
    shape = (case.tokens, case.columns)
    x, residual = (device.tensor(rng.normal(size=shape), case.dtype) for _ in range(2))
    weight = device.tensor(1 + 0.3 * rng.normal(size=case.columns), case.dtype)
    total = seen(x) + seen(residual)
    normed, kept = ops.residual_norm_quant(x=x, residual=residual, weight=weight, eps=_EPS, out_format=wanted)
    device.compare("the new residual", kept, Bounded(total, rounded(total, case.dtype)))
    exact = oracle.rms_norm(total, seen(weight), _EPS, False, case.dtype)
    moved = np.abs(exact.value) * 4 * rounded(np.ones(1), case.dtype)
    moved = moved + np.abs(seen(weight)) * rounded(total, case.dtype)
    judge(device, loaded, "product behind a norm", Bounded(exact.value, exact.bound + moved), normed)
    gate_up = device.tensor(rng.normal(size=(case.tokens, 2 * case.columns)), case.dtype)
    made = ops.gate_up_act_quant(gate_up=gate_up.clone(), activation="silu", out_format=wanted)
    gate, up = np.split(seen(gate_up), 2, axis=-1)
    judge(device, loaded, "product behind an activation", oracle.gated_activation(gate, up, "silu", case.dtype), made)


def judge(device: Device, loaded: test_linear.Loaded, what: str, before: Bounded, given: object) -> None:
    """The product of what an op before it gave: any format that the kernel accepts."""
    case = loaded.case
    size = np.abs(before.value) + before.bound
    slack = scheme_slack(size, case.scheme, case.dtype, None)
    dense = np.concatenate([matrix.dense for matrix in loaded.matrices])
    result = loaded.kernel.apply(given, loaded.packed)  # type: ignore[arg-type]
    dx = before.bound + slack.dx
    device.compare(what, result, oracle.linear(before.value, dense, None, case.dtype, dx=dx, dw=slack.dw))
