"""A refused spec is told every reason, and what comes nearest."""

from __future__ import annotations

import pytest

from anychip.plugin_api import AttentionSpec, Capabilities, LinearPart, LinearSpec, QuantScheme
from anychip.plugin_api.refusals import among, undeclared


@pytest.mark.parametrize(
    ("wanted", "there", "nearest"),
    [
        ("float16", {"float32", "bfloat16"}, "bfloat16"),
        ("float16", {"float32"}, "float32"),
        ("float32", {"float16", "bfloat16"}, "bfloat16"),
        ("int8-w8a8", {"int8", "int4"}, "int8"),
        ("int4", {"int8", "fp8"}, "fp8"),
        ("fp8", {"int4"}, "int4"),
        (320, {64, 128, 256}, "256"),
        (70, {64, 128, 256}, "64"),
        (24, (16, 32, 64), "16"),
    ],
)
def test_as_many_bits_come_nearest_then_more_then_fewer(wanted, there, nearest):
    assert among(wanted, there).startswith(f"{nearest} is nearest; available: ")


def test_a_long_list_is_shown_by_its_ends():
    assert among(320, set(range(8, 257))) == "256 is nearest; available: 8 to 256"
    assert among("int4", set()) == "there is none"


def test_every_reason_is_told():
    spec = AttentionSpec(
        num_heads=4, num_kv_heads=2, head_dim=320, dtype="float16", kv_dtype="int8", softcap=30.0, window=5
    )
    device = Capabilities(
        dtypes=frozenset({"bfloat16"}), head_dims=frozenset({64, 256}), kv_dtypes=frozenset({"bfloat16"}), softcap=False
    )
    assert undeclared(spec, device) == [
        "dtype float16; bfloat16 is nearest; available: bfloat16",
        "a cache of int8; bfloat16 is nearest; available: bfloat16",
        "head_dim 320; 256 is nearest; available: 64, 256",
        "softcap",
    ]


@pytest.mark.parametrize(("activations", "name"), [("plain", "fp8-w8a16"), ("token", "fp8")])
def test_a_scheme_that_is_not_declared_has_a_nearest_one(activations, name):
    spec = LinearSpec(
        in_features=8, out_features=8, parts=(LinearPart(name="w", offset=0, rows=8),), dtype="bfloat16",
        scheme=QuantScheme(values="fp8_e4m3", scales="channel", activations=activations),
    )  # fmt: skip
    device = Capabilities(quantization=frozenset({"int8", "int4"}))
    assert undeclared(spec, device) == [f"quantization {name}; int8 is nearest; available: int4, int8"]


def test_an_epilogue_is_of_a_dense_product_and_declared():
    parts = (LinearPart(name="gate", offset=0, rows=8), LinearPart(name="up", offset=8, rows=8))
    scheme = QuantScheme(values="int8", scales="channel")
    device = Capabilities(epilogues=frozenset({"silu"}))
    refused = {
        (epilogue, quantized): undeclared(
            LinearSpec(
                in_features=8, out_features=16, parts=parts, dtype="float32", epilogue=epilogue,
                scheme=scheme if quantized else None,
            ),
            device,
        )
        for epilogue in ("silu", "gelu_tanh")
        for quantized in (False, True)
    }  # fmt: skip
    quantized = "an epilogue of a quantized product: {} of int8"
    assert refused == {
        ("silu", False): [],
        ("silu", True): [quantized.format("silu")],
        ("gelu_tanh", False): ["epilogue gelu_tanh"],
        ("gelu_tanh", True): ["epilogue gelu_tanh", quantized.format("gelu_tanh")],
    }
