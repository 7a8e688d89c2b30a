"""Mixture of experts: routing, experts, combination, experts of other ranks."""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec
import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from anychip.plugin_api import Activation, FusedMoE, MoESpec, Routing
from anychip_conformance.case import kind
from anychip_conformance.choices import CaseDtype, each_dtype
from anychip_conformance.device import Device, refuses, seen, unchanged
from anychip_conformance.oracle import vectorised as oracle
from anychip_conformance.oracle.rounding import UNIT_ROUNDOFF
from anychip_conformance.oracle.vectorised import Bounded, Expert
from anychip_conformance.products import FORMATS, Matrix, Scheme, make_matrix, scheme_slack, stream

MOE_SCHEMES = (
    Scheme(name="int8", scales="channel"),
    Scheme(name="int4", scales="group", group_size=16),
    Scheme(name="int4", scales="group", group_size=16, zero_points=True),
)

MOE_FORMATS = tuple(scheme for scheme in FORMATS if scheme.name in ("mxfp4", "nvfp4"))


_LAST = 4
"""Numbers of a wide hidden state that have most of its size."""


class MoECase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`away` experts, the last ones, live on other ranks; or `local` experts, the last ones, are all that is loaded
    here. `crowded` sends every token to the same experts. `strided`
    gives a slice of wider activations."""

    tokens: int = 7
    experts: int = 8
    top_k: int = 2
    hidden: int = 32
    intermediate: int = 24
    dtype: CaseDtype = "any"
    activation: Activation = "silu"
    bias: bool = False
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    groups: int = 1
    top_groups: int = 1
    router_bias: bool = False
    router_scale: float = 1.0
    scheme: Scheme | None = None
    away: int = 0
    local: int = 0
    shared: bool = False
    crowded: bool = False
    every: bool = False
    """Tokens pick the experts in turn, and together all of them; of wide activations, the last numbers count most."""
    guarded: bool = False
    invariant: bool = False
    seed: int = 0

    @property
    def spec(self) -> MoESpec:
        return MoESpec(
            num_experts=self.experts,
            top_k=self.top_k,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            dtype=self.dtype,
            activation=self.activation,
            bias=self.bias,
            scoring=self.scoring,
            renormalize=self.renormalize,
            num_groups=self.groups,
            top_groups=self.top_groups,
            router_bias=self.router_bias,
            router_scale=self.router_scale,
            scheme=None if self.scheme is None else self.scheme.spec,
            invariant=self.invariant,
            num_local_experts=self.local or None,
        )

    @property
    def here(self) -> range:
        """The experts that contribute."""
        return range(self.experts - self.local, self.experts) if self.local else range(self.experts - self.away)


def kernel_for(device: Device, case: MoECase) -> FusedMoE:
    device.need_dtype(case.dtype)
    if case.scheme is not None:
        name = case.scheme.name
        device.need(f"quantization {name}", name in device.capabilities.quantization, refuses(device, case.spec))
    if case.invariant:
        device.need("batch_invariant", device.capabilities.batch_invariant, refuses(device, case.spec))
    return device.platform.moe(case.spec)


class Loaded:
    """A kernel with its experts, and what they stand for."""

    def __init__(self, device: Device, case: MoECase) -> None:
        self.device, self.case = device, case
        self.kernel = kernel_for(device, case)
        self.packed: Any = self.kernel.begin()
        rng = np.random.default_rng(case.seed)
        self.experts = [self._expert(index, rng) for index in range(case.experts)]
        self.packed = self.kernel.finish(self.packed)
        if case.away:
            here = np.where(np.arange(case.experts) < case.experts - case.away, np.arange(case.experts), -1)
            self.expert_map: Tensor | None = device.held(here, "int64")
            self.packed = self.kernel.remap(self.packed, self.expert_map)
        elif case.local:
            numbers = np.arange(case.experts)
            self.expert_map = device.held(np.where(numbers >= case.here.start, numbers - case.here.start, -1), "int64")
        else:
            self.expert_map = None

    def _expert(self, index: int, rng: np.random.Generator) -> Expert:
        case, device = self.case, self.device
        shapes = {"gate": (case.intermediate, case.hidden), "up": (case.intermediate, case.hidden),
                  "down": (case.hidden, case.intermediate)}  # fmt: skip
        matrices: dict[str, Matrix] = {}
        biases: dict[str, Any] = {}

        def load(part: str, tensor: Tensor, *, row: int = 0) -> None:
            if not case.local:
                self.kernel.load(self.packed, index, part, tensor, row=row)
            elif index in case.here:
                self.kernel.load(self.packed, case.here.index(index), part, tensor, row=row)

        for part, (rows, columns) in shapes.items():
            matrices[part] = make_matrix(device, rng, rows, columns, case.dtype, case.scheme)
            stream(matrices[part], part, load)
            if case.bias:
                bias = device.held(rng.normal(size=rows), case.dtype)
                load(f"{part}.bias", bias)
                biases[f"{part}_bias"] = seen(bias)
        return Expert(**{part: matrix.dense for part, matrix in matrices.items()}, **biases)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Activations, router logits that no rounding reorders, and the correction for picking."""
        case, rng = self.case, np.random.default_rng((self.case.seed, 3))
        wide = rng.normal(size=(case.tokens, case.hidden))
        if case.every:
            wide[:, :-_LAST] *= min(1.0, _LAST / case.hidden)
        x = self.device.tensor(wide, case.dtype)
        return x, *router_inputs(self.device, case)

    def judge(self, x: Tensor, logits: Tensor, bias: Tensor | None, shared: Tensor | None, result: Tensor) -> None:
        case = self.case
        route = expected_route(case, logits, bias)
        dw = 0.0 if case.scheme is None else 2 * UNIT_ROUNDOFF[case.dtype]
        outputs = {
            index: oracle.run_expert(
                seen(x), self.experts[index], case.activation, case.dtype, dw=dw,
                rounding=lambda x: scheme_slack(x, case.scheme, case.dtype, None).dx,
            )
            for index in case.here
        }  # fmt: skip
        expected = oracle.combine(outputs, route.weights, route.ids, route.bound, case.dtype)
        if shared is not None:
            value = expected.value + seen(shared)
            expected = Bounded(value, expected.bound + np.abs(value) * 2 * UNIT_ROUNDOFF[case.dtype])
        name = "moe" if case.scheme is None else f"moe {case.scheme.name}"
        self.device.compare("combined output", result, expected, label=f"{name}/{case.dtype}")

    def judge_rows(self, x: Tensor, experts: np.ndarray, result: Tensor) -> None:
        """Of rows with one expert each, [num_tokens], and a weight of one."""
        case = self.case
        ones = np.ones((len(experts), 1))
        dw = 0.0 if case.scheme is None else 2 * UNIT_ROUNDOFF[case.dtype]
        outputs = {
            index: oracle.run_expert(seen(x), self.experts[index], case.activation, case.dtype, dw=dw)
            for index in case.here
        }
        expected = oracle.combine(outputs, ones, experts[:, None], np.zeros_like(ones), case.dtype)
        self.device.compare("rows of one expert", result, expected)


def router_ladder(count: int) -> np.ndarray:
    """So many numbers from -2 to 2 in order, of which no two are one in a narrow dtype."""
    if count <= 256:
        return np.linspace(-2.0, 2.0, count)
    steps = np.concatenate([2.0**octave * (1 + np.arange(128) / 128) for octave in (-2, -1, 0)])
    half = np.sort(steps)[-((count + 1) // 2) :]
    return np.concatenate([-half[::-1], half])[:count]


def router_inputs(device: Device, case: MoECase) -> tuple[Tensor, Tensor | None]:
    """Logits a fixed distance apart, in random order, so that the picked experts are beyond doubt."""
    rng = np.random.default_rng((case.seed, 5))
    ladder = router_ladder(case.experts)
    order = np.argsort(rng.random((case.tokens, case.experts)), axis=-1)
    if case.crowded:
        order[:] = order[:1]
    if case.every:
        first = np.arange(case.tokens)[:, None] * case.top_k
        order = case.experts - 1 - (np.arange(case.experts) - first) % case.experts
    bias = None
    if case.router_bias:
        bias = device.held(rng.uniform(-0.3, 0.3, case.experts), "float32")
    return device.tensor(ladder[order], case.dtype), bias


def expected_route(case: MoECase, logits: Tensor, bias: Tensor | None) -> oracle.Route:
    return oracle.route(
        seen(logits),
        None if bias is None else seen(bias),
        top_k=case.top_k,
        scoring=case.scoring,
        renormalize=case.renormalize,
        num_groups=case.groups,
        top_groups=case.top_groups,
        scale=case.router_scale,
    )


def check(device: Device, case: MoECase) -> None:
    loaded = Loaded(device, case)
    x, logits, bias = loaded.inputs()
    shared = device.tensor(np.random.default_rng(case.seed).normal(size=(case.tokens, case.hidden)), case.dtype)
    given = shared if case.shared else None
    out = None
    if case.guarded:
        out = device.tensor(np.full((case.tokens + 4, case.hidden), np.nan), case.dtype, written=True)
    same = unchanged(device, {"x": x, "router_logits": logits, "shared": shared})
    result = loaded.kernel.apply(
        x,
        logits,
        loaded.packed,
        router_bias=bias,
        shared=given,
        expert_map=loaded.expert_map,
        out=None if out is None else out[2:-2],
    )
    same()
    loaded.judge(x, logits, bias, given, result)
    if out is not None:
        loaded.judge(x, logits, bias, given, out[2:-2])
        assert bool(out[:2].isnan().all()) and bool(out[-2:].isnan().all()), "rows beside the output were written"


_routes = {
    "scoring": st.sampled_from(["softmax", "sigmoid"]),
    "renormalize": st.booleans(),
    "router_scale": st.sampled_from([1.0, 2.5]),
    "router_bias": st.booleans(),
}
_common = {
    "tokens": st.sampled_from([1, 2, 7, 33]),
    "top_k": st.integers(1, 4),
    "dtype": st.sampled_from(["any", "narrow"]),
    "seed": st.integers(0, 2**16),
}


@kind(
    "moe.route",
    corpus=each_dtype(
        MoECase(),
        MoECase(renormalize=False),
        MoECase(scoring="sigmoid", renormalize=False, router_scale=2.5),
        MoECase(scoring="sigmoid", router_bias=True, groups=4, top_groups=2),
        MoECase(groups=2, top_groups=1, top_k=3),
        MoECase(router_bias=True),
    ),
    drawn=st.builds(MoECase, groups=st.sampled_from([1, 2, 4]), top_groups=st.just(2), **{**_common, **_routes}).filter(
        lambda case: (
            case.groups == 1 or (case.top_groups <= case.groups and case.top_k <= 8 // case.groups * case.top_groups)
        )
    ),
    quick=6,
)
def route(device: Device, case: MoECase) -> None:
    """Softmax or sigmoid over all experts, then the best; weights of what was picked, renormalised, scaled; corrections
    pick and do not weigh."""
    kernel = kernel_for(device, case)
    logits, bias = router_inputs(device, case)
    routing: Routing = kernel.route(logits, bias)
    expected = expected_route(case, logits, bias)
    order = np.argsort(seen(routing.expert_ids), axis=-1, kind="stable")
    wanted = np.argsort(expected.ids, axis=-1, kind="stable")
    picked = np.take_along_axis(seen(routing.expert_ids), order, -1)
    device.compare(
        "picked experts, sorted", torch.from_numpy(picked),
        Bounded(np.take_along_axis(expected.ids, wanted, -1).astype(float), np.zeros(picked.shape)),
    )  # fmt: skip
    weights = torch.from_numpy(np.take_along_axis(seen(routing.weights), order, -1))
    bound = np.take_along_axis(expected.bound, wanted, -1)
    device.compare(
        "weights by expert", weights, Bounded(np.take_along_axis(expected.weights, wanted, -1), bound),
        label=f"moe route/{case.dtype}",
    )  # fmt: skip


@kind(
    "moe.experts",
    corpus=each_dtype(
        MoECase(),
        MoECase(tokens=1, top_k=1),
        MoECase(tokens=33, experts=16, top_k=4, hidden=48, intermediate=80),
        MoECase(crowded=True, tokens=9),
        MoECase(bias=True, activation="swiglu_clamped"),
        MoECase(activation="gelu_tanh", guarded=True),
        MoECase(shared=True),
    ),
    drawn=st.builds(
        MoECase,
        activation=st.sampled_from(get_args(Activation)),
        bias=st.booleans(),
        shared=st.booleans(),
        crowded=st.booleans(),
        guarded=st.booleans(),
        **{**_common, **_routes},
    ),
    quick=6,
)
def experts(device: Device, case: MoECase) -> None:
    """Each token's experts, gate and up at their places, weighted once and after down; experts without tokens add
    nothing."""
    check(device, case)


@kind(
    "moe.expert_map",
    corpus=each_dtype(MoECase(away=3), MoECase(away=7, tokens=12), MoECase(away=4, crowded=True, top_k=1, tokens=3)),
    drawn=st.builds(MoECase, away=st.integers(1, 7), **_common),
)
def expert_map(device: Device, case: MoECase) -> None:
    """Experts of other ranks, -1 in the map, contribute nothing, and do not wrap to the last one held here."""
    check(device, case)


@kind(
    "moe.local_experts",
    corpus=[
        *each_dtype(MoECase(local=4), MoECase(local=1, tokens=12), MoECase(local=3, bias=True)),
        *[MoECase(local=3, scheme=scheme) for scheme in MOE_SCHEMES],
    ],
)
def local_experts(device: Device, case: MoECase) -> None:
    """Where only some experts are loaded, each serves its own number, and tokens of others are not touched."""
    check(device, case)


@kind(
    "moe.quantized",
    profile="quantization",
    corpus=[
        MoECase(scheme=scheme, dtype=dtype, bias=scheme.zero_points)  # type: ignore[arg-type]
        for scheme in MOE_SCHEMES
        for dtype in ("any", "narrow")
    ],
    drawn=st.builds(MoECase, scheme=st.sampled_from(MOE_SCHEMES), **_common),
)
def quantized(device: Device, case: MoECase) -> None:
    """Experts of integer weights: each expert's own scales and zeros."""
    check(device, case)


@kind(
    "moe.formats",
    profile="quantization",
    corpus=[
        MoECase(scheme=scheme, dtype=dtype, hidden=64, intermediate=32, bias=scheme.name == "mxfp4")  # type: ignore[arg-type]
        for scheme in MOE_FORMATS
        for dtype in ("any", "narrow")
    ],
    drawn=st.builds(
        MoECase, scheme=st.sampled_from(MOE_FORMATS), hidden=st.just(64), intermediate=st.just(32), **_common
    ),
    examples=20,
)
def formats(device: Device, case: MoECase) -> None:
    """Experts of four-bit floats: each expert's own scales, gate's and up's global ones apart."""
    check(device, case)


@kind("moe.no_tokens", corpus=[MoECase(tokens=0)])
def no_tokens(device: Device, case: MoECase) -> None:
    """No tokens in, no tokens out."""
    loaded = Loaded(device, case)
    x, logits, _ = loaded.inputs()
    assert tuple(loaded.kernel.apply(x, logits, loaded.packed).shape) == (0, case.hidden)


@kind("moe.update", corpus=each_dtype(MoECase(tokens=16)))
def update(device: Device, case: MoECase) -> None:
    """One expert's part is rewritten where it is."""
    device.need("reload inplace", device.capabilities.reload == "inplace")
    loaded = Loaded(device, case)
    new = make_matrix(device, np.random.default_rng(99), case.intermediate, case.hidden, case.dtype, None)
    loaded.kernel.update(loaded.packed, 2, "up", new.parts[""])
    old = loaded.experts[2]
    loaded.experts[2] = Expert(gate=old.gate, up=new.dense, down=old.down)
    x, logits, bias = loaded.inputs()
    loaded.judge(x, logits, bias, None, loaded.kernel.apply(x, logits, loaded.packed))


@kind("moe.batch_invariant", profile="deterministic", corpus=each_dtype(MoECase(tokens=12, invariant=True)), quick=0)
def batch_invariant(device: Device, case: MoECase) -> None:
    """Where batch invariance is declared, a token's bits do not depend on who shares the batch."""
    loaded = Loaded(device, case)
    x, logits, _ = loaded.inputs()
    whole = loaded.kernel.apply(x, logits, loaded.packed)
    for start, stop in ((0, 1), (4, 9)):
        alone = loaded.kernel.apply(x[start:stop].contiguous(), logits[start:stop].contiguous(), loaded.packed)
        device.same_bits(f"tokens {start} to {stop} alone", alone.contiguous(), whole[start:stop].contiguous())
