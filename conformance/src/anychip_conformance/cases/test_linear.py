"""Matrix products, dense and in every quantization scheme: loading part by part, applying, rewriting in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import msgspec
import numpy as np
from hypothesis import strategies as st
from torch import Tensor

from anychip.plugin_api import Activation, LinearKernel, LinearPart, LinearSpec
from anychip_conformance.case import kind
from anychip_conformance.choices import CaseDtype, each_dtype
from anychip_conformance.device import Device, refuses, seen, unchanged
from anychip_conformance.oracle.vectorised import Bounded, gated
from anychip_conformance.oracle.vectorised import linear as product
from anychip_conformance.products import FORMATS, SCHEMES, Matrix, Scheme, make_matrix, scheme_slack, stream

MANY_ROWS = 150
"""More rows than two chunks of loading."""


class LinearCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`rows` are those of each part. `guarded` hands the kernel storage for the result."""

    tokens: int = 5
    columns: int = 64
    rows: tuple[int, ...] = (32,)
    dtype: CaseDtype = "any"
    scheme: Scheme | None = None
    bias: bool = False
    strided: bool = False
    guarded: bool = False
    invariant: bool = False
    epilogue: Activation | None = None
    needles: bool = False
    """A few columns count, the last among them, and others next to nothing: a column that is left out shows."""
    seed: int = 0

    @property
    def spec(self) -> LinearSpec:
        starts = np.cumsum((0, *self.rows)).tolist()
        return LinearSpec(
            in_features=self.columns,
            out_features=sum(self.rows),
            parts=tuple(LinearPart(name=f"p{i}", offset=starts[i], rows=n) for i, n in enumerate(self.rows)),
            dtype=self.dtype,
            bias=self.bias,
            scheme=None if self.scheme is None else self.scheme.spec,
            invariant=self.invariant,
            epilogue=self.epilogue,
        )

    @property
    def features(self) -> int:
        """Of the result."""
        return sum(self.rows) // (1 if self.epilogue is None else 2)


def column_sizes(columns: int) -> np.ndarray:
    """One for the first column, the last two, and those before and behind a size where something changes; next to
    nothing for others."""
    sizes = np.full(columns, min(1.0, 4.0 / columns))
    edges = [edge + step for edge in (128, 1024, 4096, 16_384, 32_768) for step in (-1, 0) if edge + step < columns]
    sizes[[0, columns - 2, columns - 1, *edges]] = 1.0
    return sizes


class Loaded:
    """A kernel with its weights, and what they stand for."""

    def __init__(self, device: Device, case: LinearCase) -> None:
        device.need_dtype(case.dtype)
        if case.scheme is not None:
            name = case.scheme.name
            device.need(f"quantization {name}", name in device.capabilities.quantization, refuses(device, case.spec))
        if case.epilogue is not None:
            name = case.epilogue
            device.need(f"epilogue {name}", name in device.capabilities.epilogues, refuses(device, case.spec))
        rng = np.random.default_rng(case.seed)
        self.device, self.case = device, case
        self.kernel: LinearKernel = device.platform.linear(case.spec)
        self.packed: Any = self.kernel.begin()
        self.matrices: list[Matrix] = []
        self.biases: list[Tensor] = []
        for index, rows in enumerate(case.rows):
            matrix = make_matrix(device, rng, rows, case.columns, case.dtype, case.scheme)
            self.matrices.append(matrix)
            stream(matrix, f"p{index}", self._load)
            if case.bias:
                self.biases.append(device.held(rng.normal(size=rows), case.dtype))
                self.kernel.load(self.packed, f"p{index}.bias", self.biases[-1])
        self.packed = self.kernel.finish(self.packed)

    def _load(self, part: str, tensor: Tensor, *, row: int = 0) -> None:
        self.kernel.load(self.packed, part, tensor, row=row)

    def inputs(self, tokens: int, *, salt: int = 0) -> Tensor:
        case = self.case
        wide = np.random.default_rng((case.seed, 7, salt)).normal(
            size=(tokens, case.columns + (5 if case.strided else 0))
        )
        if case.needles:
            wide *= column_sizes(case.columns)
        return self.device.tensor(wide, case.dtype)[:, : case.columns]

    def judge(self, x: Tensor, result: Tensor) -> None:
        case = self.case
        weight = np.concatenate([matrix.dense for matrix in self.matrices])
        bias = np.concatenate([seen(b) for b in self.biases]) if self.biases else None
        # Parts of one product see the same activations: the widest static range holds them all.
        scales = [matrix.input_scale for matrix in self.matrices if matrix.input_scale is not None]
        slack = scheme_slack(seen(x), case.scheme, case.dtype, max(scales) if scales else None)
        expected = product(seen(x), weight, bias, case.dtype, dx=slack.dx, dw=slack.dw)
        if case.epilogue is not None:
            gate, up = (
                Bounded(expected.value[:, part], expected.bound[:, part])
                for part in (slice(case.features), slice(case.features, None))
            )
            expected = gated(gate, up, case.epilogue, case.dtype)
        label = "linear" if case.scheme is None else f"linear {case.scheme.name} {case.scheme.scales}"
        self.device.compare("product", result, expected, label=f"{label}/{case.dtype}")


def check(device: Device, case: LinearCase) -> None:
    loaded = Loaded(device, case)
    x = loaded.inputs(case.tokens)
    same = unchanged(device, {"x": x})
    out = None
    if case.guarded:
        out = device.tensor(np.full((case.tokens + 4, case.features), np.nan), case.dtype, written=True)
    result = loaded.kernel.apply(x, loaded.packed, out=None if out is None else out[2:-2])
    same()
    loaded.judge(x, result)
    if out is not None:
        loaded.judge(x, out[2:-2])
        assert bool(out[:2].isnan().all()) and bool(out[-2:].isnan().all()), "rows beside the output were written"


_drawn = st.builds(
    LinearCase,
    tokens=st.sampled_from([1, 2, 3, 8, 16, 17, 33]),
    columns=st.sampled_from([1, 7, 16, 31, 64, 96, 200]),
    rows=st.lists(st.sampled_from([1, 3, 16, 63, 64, 65, 100]), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(["any", "narrow"]),
    bias=st.booleans(),
    strided=st.booleans(),
    guarded=st.booleans(),
    seed=st.integers(0, 2**16),
)


@kind(
    "linear.dense",
    corpus=each_dtype(
        LinearCase(),
        LinearCase(tokens=1, columns=200, rows=(48, 16, 16), bias=True),
        LinearCase(tokens=33, columns=31, rows=(MANY_ROWS, 7), guarded=True),
        LinearCase(tokens=17, columns=1024, rows=(40,), strided=True),
    ),
    drawn=_drawn,
)
def dense(device: Device, case: LinearCase) -> None:
    """x W^T + b over stacked parts, loaded in chunks of rows from storage that is reused."""
    check(device, case)


@kind(
    "linear.epilogue",
    corpus=[
        LinearCase(tokens=1, rows=(32, 32), epilogue="silu"),
        LinearCase(tokens=1, rows=(32, 32), epilogue="silu", dtype="narrow"),
        LinearCase(tokens=16, columns=200, rows=(65, 65), epilogue="gelu_tanh", bias=True),
        LinearCase(tokens=33, columns=31, rows=(MANY_ROWS, MANY_ROWS), epilogue="silu", bias=True, guarded=True),
        LinearCase(tokens=7, columns=96, rows=(48, 48), epilogue="swiglu_clamped", dtype="narrow"),
        LinearCase(tokens=0, rows=(16, 16), epilogue="silu"),
    ],
    drawn=st.builds(
        LinearCase,
        tokens=st.sampled_from([1, 2, 16, 17, 33]),
        columns=st.sampled_from([7, 64, 200]),
        rows=st.sampled_from([(16, 16), (63, 63), (100, 100)]),
        dtype=st.sampled_from(["any", "narrow"]),
        epilogue=st.sampled_from(get_args(Activation)),
        bias=st.booleans(),
        seed=st.integers(0, 2**16),
    ),
    examples=30,
)
def epilogue(device: Device, case: LinearCase) -> None:
    """Of gate and up, stacked in that order, comes act(gate) * up; what is not declared is refused."""
    check(device, case)


def _each(schemes: Sequence[Scheme]) -> list[LinearCase]:
    return [
        LinearCase(tokens=tokens, columns=96, rows=rows, scheme=scheme, dtype=dtype, bias=tokens == 1)  # type: ignore[arg-type]
        for scheme in schemes
        for tokens, rows in ((1, (32,)), (9, (64, 32)))
        for dtype in ("any", "narrow")
    ]


def _drawn(schemes: Sequence[Scheme]) -> st.SearchStrategy[LinearCase]:
    return st.builds(
        LinearCase,
        tokens=st.sampled_from([1, 2, 8, 33]),
        columns=st.sampled_from([32, 64, 96, 160]),
        rows=st.sampled_from([(32,), (64, 32), (96, 32, 32)]),
        dtype=st.sampled_from(["any", "narrow"]),
        scheme=st.sampled_from(schemes),
        bias=st.booleans(),
        seed=st.integers(0, 2**16),
    )


@kind(
    "linear.quantized",
    profile="quantization",
    corpus=_each(SCHEMES),
    drawn=_drawn(SCHEMES),
    examples=60,
)
def quantized(device: Device, case: LinearCase) -> None:
    """Every scheme: scales by tensor, row, group or block at their own places, zero points, rounded activations."""
    check(device, case)


@kind(
    "linear.formats",
    profile="quantization",
    corpus=_each(FORMATS),
    drawn=_drawn(FORMATS),
    examples=40,
)
def formats(device: Device, case: LinearCase) -> None:
    """Four-bit floats, powers of two and two-level scales, float zeros, codebooks: weights alone, each where it is
    declared, and refused where it is not."""
    check(device, case)


@kind("linear.update", corpus=each_dtype(LinearCase(rows=(MANY_ROWS, 16), bias=True)))
def update(device: Device, case: LinearCase) -> None:
    """A part of finished weights is rewritten where it is: what captured their storage sees the new values."""
    device.need("reload inplace", device.capabilities.reload == "inplace")
    loaded = Loaded(device, case)
    new = make_matrix(device, np.random.default_rng(case.seed + 1), case.rows[1], case.columns, case.dtype, None)
    loaded.kernel.update(loaded.packed, "p1", new.parts[""])
    loaded.matrices[1] = new
    x = loaded.inputs(case.tokens)
    loaded.judge(x, loaded.kernel.apply(x, loaded.packed))


@kind("linear.adopt", corpus=each_dtype(LinearCase(rows=(48,)), LinearCase(rows=(20, 12), columns=33)))
def adopt(device: Device, case: LinearCase) -> None:
    """A finished plain weight is taken as it is: tied embeddings."""
    loaded = Loaded(device, case)
    weight = device.held(np.concatenate([matrix.dense for matrix in loaded.matrices]), case.dtype)
    packed = loaded.kernel.adopt(weight)
    x = loaded.inputs(case.tokens)
    loaded.judge(x, loaded.kernel.apply(x, packed))


@kind("linear.no_tokens", corpus=[LinearCase(tokens=0)])
def no_tokens(device: Device, case: LinearCase) -> None:
    """A product of no rows has no rows."""
    loaded = Loaded(device, case)
    assert tuple(loaded.kernel.apply(loaded.inputs(0), loaded.packed).shape) == (0, case.features)


@kind("linear.undeclared", corpus=[LinearCase(columns=96, scheme=scheme) for scheme in SCHEMES], quick=9)
def undeclared(device: Device, case: LinearCase) -> None:
    """A scheme that is not declared is refused by the factory; one that is declared is served."""
    assert case.scheme is not None
    name = case.scheme.name
    device.need(f"quantization {name}", name in device.capabilities.quantization, refuses(device, case.spec))
    device.platform.linear(case.spec)
    device.only_made()


@kind(
    "linear.batch_invariant",
    profile="deterministic",
    corpus=each_dtype(LinearCase(tokens=17, columns=200, rows=(64,), invariant=True)),
    quick=0,
)
def batch_invariant(device: Device, case: LinearCase) -> None:
    """Where batch invariance is declared, a row's bits do not depend on who shares the batch."""
    device.need("batch_invariant", device.capabilities.batch_invariant, refuses(device, case.spec))
    loaded = Loaded(device, case)
    x = loaded.inputs(case.tokens)
    whole = loaded.kernel.apply(x, loaded.packed)
    for start, stop in ((0, 1), (3, 4), (5, 12)):
        alone = loaded.kernel.apply(x[start:stop].contiguous(), loaded.packed)
        device.same_bits(f"rows {start} to {stop} alone", alone.contiguous(), whole[start:stop].contiguous())
