"""Products, mixtures of experts and draws of every variant that this processor runs, against the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.ops.reference import REFERENCE
from anychip.ops.table import resolve_ops
from anychip.plugin_api import NAMED, LinearPart, LinearSpec, MoESpec, QuantScheme
from anychip_cpu import native
from anychip_cpu.probe import available_cores

OPS = resolve_ops("cpu", {}).ops
COMPILED = native.usable()
VARIANTS = [*COMPILED, native.REFERENCE]

SCHEMES = {
    "plain": None,
    "int8": QuantScheme(values="int8", scales="channel"),
    "int4": QuantScheme(values="int4", scales="group", group_size=32),
    "int4 with zeros": QuantScheme(values="int4", scales="group", group_size=16, zero_points="int"),
    "int4 with float zeros": QuantScheme(values="int4", scales="group", group_size=32, zero_points="float"),
    "int8 with float zeros": QuantScheme(values="int8", scales="group", group_size=16, zero_points="float"),
    "fp8 in blocks": QuantScheme(values="fp8_e4m3", scales="block", group_size=64),
    "fp8 by token": QuantScheme(values="fp8_e4m3", scales="channel", activations="token"),
    "w8a8": QuantScheme(values="int8", scales="channel", activations="token"),
    "w8a8 in groups": QuantScheme(values="int8", scales="group", group_size=32, activations="group"),
    "mxfp4": NAMED["mxfp4"],
    **{name: scheme for name, scheme in NAMED.items() if name.startswith(("f16-", "super-")) or "minima" in name},
    "super-int6 in long groups": replace(NAMED["super-int6"], group_size=128),
    "f16-int5-minima by channel": replace(NAMED["f16-int5-minima"], scales="channel", group_size=None),
}


def parts_of(scheme, rows, columns):
    """Random parts of a matrix in the canonical form of a scheme, by kind."""
    if scheme is None:
        return {"": torch.randn(rows, columns)}
    groups = -(-columns // scheme.group_size) if scheme.group_size else 1
    if scheme.values == "fp8_e4m3":
        values = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    elif scheme.values == "int8":
        values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    else:
        values = torch.randint(0, 1 << scheme.bits, (rows, columns), dtype=torch.uint8)
    shape = {"channel": (rows,), "group": (rows, groups), "block": (-(-rows // 64), groups)}[scheme.scales]
    parts = {"": values, "scale": scales_of(scheme, shape)}
    if scheme.zero_points == "minima":
        parts["minimum"] = scales_of(scheme, shape) * (3 if scheme.scale_format != "int8" else 1)
    elif scheme.zero_points:
        whole = scheme.zero_points == "int"
        parts["zero"] = torch.randint(0, 16, shape, dtype=torch.uint8) if whole else torch.randn(shape) * 9
    if scheme.super_group_size:
        upper = rows, -(-columns // scheme.super_group_size)
        for kind in [kind for kind in parts if kind]:
            parts[f"super_{kind}"] = (torch.randn(upper) * 1e-3).half()
    return parts


def scales_of(scheme, shape):
    if scheme.scale_format == "int8":
        return torch.randint(-63, 64, shape, dtype=torch.int8)
    if scheme.scale_format == "e8m0":
        return torch.randint(118, 124, shape, dtype=torch.uint8)
    return (torch.rand(shape) * 0.02 + 0.01).to(getattr(torch, scheme.scale_format))


@settings(max_examples=80, deadline=None)
@given(
    scheme=st.sampled_from(list(SCHEMES)),
    tokens=st.sampled_from([0, 1, 2, 5, 12, 13, 31, 100]),
    columns=st.sampled_from([8, 40, 64, 200, 2100]),
    sizes=st.lists(st.sampled_from([1, 7, 32, 64, 100]), min_size=1, max_size=3),
    bias=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    isa=st.sampled_from(VARIANTS),
    threads=st.sampled_from([1, min(2, available_cores())]),
    seed=st.integers(0, 2**16),
)
def test_products_equal_the_reference(open_cpu, scheme, tokens, columns, sizes, bias, dtype, isa, threads, seed):
    torch.manual_seed(seed)
    offsets = np.cumsum([0, *sizes]).tolist()
    spec = LinearSpec(
        in_features=columns, out_features=offsets[-1], dtype=dtype, bias=bias, scheme=SCHEMES[scheme],
        parts=tuple(LinearPart(name=f"p{i}", offset=offsets[i], rows=size) for i, size in enumerate(sizes)),
    )  # fmt: skip
    opened = open_cpu(isa, threads)
    kernels = [opened.linear(spec), REFERENCE.linear(spec, opened)]
    packed = [kernel.begin() for kernel in kernels]
    for i, size in enumerate(sizes):
        parts = parts_of(spec.scheme, size, columns)
        if bias:
            parts["bias"] = torch.randn(size)
        for kind, tensor in parts.items():
            pieces = tensor.split(64) if kind == "" else [tensor]
            for number, piece in enumerate(pieces):
                name = f"p{i}.{kind}" if kind else f"p{i}"
                for kernel, weights in zip(kernels, packed, strict=True):
                    kernel.load(weights, name, piece, row=64 * number if kind == "" else 0)
    packed = [kernel.finish(weights) for kernel, weights in zip(kernels, packed, strict=True)]
    x = torch.randn(tokens, columns + 3)[:, :columns].to(getattr(torch, dtype))
    mine, theirs = (kernel.apply(x, weights) for kernel, weights in zip(kernels, packed, strict=True))
    bound = 2e-4 if dtype == "float32" else 1e-2
    torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound * columns**0.5)
    if kernels[0].reads_rows:
        ids = torch.randint(-1, offsets[-1] + 1, (7,))
        mine, theirs = (kernel.rows(weights, ids) for kernel, weights in zip(kernels, packed, strict=True))
        exact = not spec.scheme.zero_points or spec.scheme.scale_format != "float32"  # of few bits
        torch.testing.assert_close(mine, theirs, rtol=0 if exact else 1e-2, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_huge_activation_does_not_flatten_the_others(open_cpu, isa, scheme):
    """Models have them: one input a thousand times its neighbours, which few outputs weigh."""
    torch.manual_seed(0)
    rows, columns = 64, 1024
    spec = LinearSpec(
        in_features=columns, out_features=rows, dtype="bfloat16", scheme=SCHEMES[scheme],
        parts=(LinearPart(name="all", offset=0, rows=rows),),
    )  # fmt: skip
    opened = open_cpu(isa, 1)
    kernel, x = opened.linear(spec), torch.randn(3, columns).bfloat16()
    x[:, 5] = 2000
    parts = parts_of(spec.scheme, rows, columns)
    parts[""][:, 5] = 8 if scheme == "int4" else 0  # which is zero
    packed = kernel.begin()
    for kind, tensor in parts.items():
        kernel.load(packed, f"all.{kind}" if kind else "all", tensor)
    mine = kernel.apply(x, kernel.finish(packed)).double()
    values = parts[""].double() - (8 if scheme == "int4" else 0)
    weight = values * parts["scale"].double().view(rows, -1).repeat_interleave(
        columns // parts["scale"].view(rows, -1).shape[1], 1
    )
    exact = x.double() @ weight.T
    assert ((mine - exact).norm(dim=1) < 0.01 * exact.norm(dim=1)).all()


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(open_cpu, isa, bad):
    spec = LinearSpec(
        in_features=256, out_features=32, dtype="bfloat16", scheme=SCHEMES["int8"],
        parts=(LinearPart(name="all", offset=0, rows=32),),
    )  # fmt: skip
    kernel = open_cpu(isa, 1).linear(spec)
    packed = kernel.begin()
    for kind, tensor in parts_of(spec.scheme, 32, 256).items():
        kernel.load(packed, f"all.{kind}" if kind else "all", tensor)
    x = torch.ones(2, 256).bfloat16()
    x[0, 200] = bad
    result = kernel.apply(x, kernel.finish(packed))
    assert not result[0].isfinite().any()
    assert result[1].isfinite().all()


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_reads_the_embeddings_own_storage(open_cpu, isa, dtype):
    torch.manual_seed(0)
    weight = torch.randn(101, 70).to(getattr(torch, dtype))
    spec = LinearSpec(
        in_features=70, out_features=101, parts=(LinearPart(name="all", offset=0, rows=101),), dtype=dtype
    )
    kernel = open_cpu(isa, min(2, available_cores())).linear(spec)
    packed = kernel.adopt(weight)
    assert packed.held.data_ptr() == weight.data_ptr()
    for tokens in (1, 3, 6, 17):
        x = torch.randn(tokens, 70).to(weight.dtype)
        expected = (x.float() @ weight.float().T).to(weight.dtype)
        torch.testing.assert_close(
            kernel.apply(x, packed), expected, rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=1e-4
        )


# -- mixtures of experts ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    scheme=st.sampled_from(["plain", "int8", "int4", "int4 with zeros", "w8a8"]),
    tokens=st.sampled_from([1, 2, 9, 40, 150]),
    activation=st.sampled_from(["silu", "gelu_tanh", "swiglu_clamped"]),
    bias=st.booleans(),
    sizes=st.sampled_from([(32, 16), (64, 48), (96, 32)]),
    hide=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    isa=st.sampled_from(VARIANTS),
    threads=st.sampled_from([1, min(2, available_cores())]),
    seed=st.integers(0, 2**16),
)
def test_experts_equal_the_reference(
    open_cpu, scheme, tokens, activation, bias, sizes, hide, dtype, isa, threads, seed
):
    torch.manual_seed(seed)
    hidden, middle = sizes
    spec = MoESpec(
        num_experts=5, top_k=2, hidden_size=hidden, intermediate_size=middle, dtype=dtype, activation=activation,
        bias=bias, scheme=SCHEMES[scheme],
    )  # fmt: skip
    opened = open_cpu(isa, threads)
    kernels = [opened.moe(spec), REFERENCE.moe(spec, opened)]
    packed = [kernel.begin() for kernel in kernels]
    for expert in range(5):
        for part, shape in (("gate", (middle, hidden)), ("up", (middle, hidden)), ("down", (hidden, middle))):
            parts = parts_of(spec.scheme, *shape)
            if bias:
                parts["bias"] = torch.randn(shape[0])
            for kind, tensor in parts.items():
                for kernel, weights in zip(kernels, packed, strict=True):
                    kernel.load(weights, expert, f"{part}.{kind}" if kind else part, tensor)
    packed = [kernel.finish(weights) for kernel, weights in zip(kernels, packed, strict=True)]
    x, logits = torch.randn(tokens, hidden).to(getattr(torch, dtype)), torch.randn(tokens, 5)
    expert_map = torch.tensor([-1, 1, 2, 3, 4]) if hide else None
    routings = [kernel.route(logits) for kernel in kernels]
    assert routings[0].expert_ids.equal(routings[1].expert_ids)
    torch.testing.assert_close(routings[0].weights, routings[1].weights)
    mine, theirs = (
        kernel.experts(x, routings[1], weights, expert_map=expert_map)
        for kernel, weights in zip(kernels, packed, strict=True)
    )
    bound = 2e-3 if dtype == "float32" else 2e-2
    torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound * float(theirs.abs().max()))


@pytest.mark.skipif(not COMPILED, reason="no kernels were compiled")
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocab=st.sampled_from([1, 2, 33, 700]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    top_p=st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    ties=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_draws_are_the_references(open_cpu, rows, vocab, temperature, top_k, top_p, min_p, ties, seed):
    torch.manual_seed(seed)
    logits = torch.randn(rows, vocab) * 3
    if ties:
        logits = logits.round()
    arguments = {
        "logits": logits,
        "temperature": torch.full((rows,), temperature),
        "top_k": torch.full((rows,), top_k, dtype=torch.int32),
        "top_p": torch.full((rows,), top_p),
        "min_p": torch.full((rows,), min_p),
        "seed_low": torch.full((rows,), seed, dtype=torch.int32),
        "seed_high": torch.arange(rows, dtype=torch.int32) - 2,
        "sample_index": torch.arange(rows, dtype=torch.int32),
        "position": torch.arange(rows, dtype=torch.int32) + 7,
    }
    mine = open_cpu(COMPILED[0]).ops()["sample"](**arguments)
    assert mine.tolist() == OPS.sample(**arguments).tolist()
