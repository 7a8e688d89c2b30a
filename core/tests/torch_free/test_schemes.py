"""A scheme is described by its fields: those that contradict each other are refused by name, and what a device must
know to serve one is one word."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anychip.errors import Unsupported
from anychip.plugin_api import NAMED, SCHEMES, Capabilities, LinearPart, LinearSpec, QuantScheme
from anychip.plugin_api.refusals import undeclared


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"values": "int7"}, "values 'int7': choose one of int8, int6, int5, int4, int3, int2, fp8_e4m3"),
        ({"scales": "row"}, "scales 'row': choose one of tensor, channel, group, block"),
        ({"scale_format": "bf16"}, "scale_format 'bf16': choose one of float32, float16, int8, e8m0, e4m3"),
        ({"scale_format": "int8"}, "super_group_size None with scale_format 'int8'"),
        ({"super_group_size": 64}, "super_group_size 64 with scale_format 'float32'"),
        (
            {"scale_format": "int8", "super_group_size": 64},
            "super_group_size 64 with scales by channel and group_size None",
        ),
        (
            {"scales": "group", "group_size": 48, "scale_format": "int8", "super_group_size": 64},
            "super_group_size 64 with scales by group and group_size 48",
        ),
        (
            {"values": "fp8_e4m3", "zero_points": "minima"},
            "zero_points 'minima' of fp8_e4m3 values: only int8 and int6",
        ),
        ({"scales": "group"}, "group_size None with scales by group"),
        ({"group_size": 32}, "group_size 32 with scales by channel"),
        ({"scales": "group", "group_size": 0}, "group_size 0 with scales by group"),
        ({"zero_points": "int"}, "zero_points 'int' of int8 values: only int4 have such"),
        ({"values": "fp8_e4m3", "zero_points": "float"}, "zero_points 'float' of fp8_e4m3 values: only int4 and int8"),
        ({"zero_points": True}, "zero_points True: choose one of None, int, float, minima"),
        ({"values": "codebook"}, "codebook of 0 numbers with codebook values"),
        ({"codebook": (0.0, 1.0)}, "codebook of 2 numbers with int8 values"),
        ({"values": "codebook", "codebook": (0.0,) * 5}, "codebook of 5 numbers: 2 to 8 bits"),
        ({"values": "codebook", "codebook": (0.0, 1.0, 2.0, float("nan"))}, "codebook: a number is not finite"),
        ({"activations": "row"}, "activations 'row': choose one of plain, token, group, static"),
        ({"activation_format": "int8"}, "activation_format int8 with activations 'plain'"),
        ({"values": "int4", "activations": "token"}, "activation_format None with activations 'token'"),
        ({"activations": "static"}, "activations 'static' in int8"),
        ({"activations": "group"}, "activations 'group' with scales by channel"),
    ],
)
def test_fields_that_cannot_be_are_named(fields, said):
    with pytest.raises(Unsupported, match="quantization scheme: ") as refused:
        QuantScheme(**{"values": "int8", "scales": "channel", **fields})
    assert said in str(refused.value)


def test_every_reason_is_told():
    with pytest.raises(Unsupported) as refused:
        QuantScheme(values="codebook", scales="channel", group_size=8, zero_points="int", activations="group")
    assert len(refused.value.reasons) == 4


def test_names_tell_apart_what_kernels_must_know():
    assert {
        "int8",
        "int4",
        "fp8",
        "int8-w8a8",
        "fp8-w8a16",
        "mxfp4",
        "nvfp4",
        "mxfp8",
        "int4-float-zeros",
        "int8-float-zeros",
        "codebook4",
        "int4-minima",
        "int8-minima",
        *(f"f16-{word}" for word in ("int4", "int4-minima", "int5", "int5-minima", "int8", "codebook4")),
        *(f"super-{word}" for word in ("int2-minima", "int3", "int4-minima", "int5-minima", "int6", "codebook4")),
    } == SCHEMES
    int4, fp8 = NAMED["int4"], NAMED["fp8-w8a16"]
    assert replace(int4, zero_points="int", group_size=32).name == "int4"  # no kernel is chosen by these
    assert replace(int4, activations="token", activation_format="int8").name == "int4-w4a8"
    assert replace(int4, activations="token", activation_format="fp8_e4m3").name == "int4-w4afp8"
    assert replace(fp8, activations="static").name == replace(fp8, activations="token").name == "fp8"
    assert replace(fp8, values="fp8_e5m2").name == "fp8-e5m2"
    assert replace(fp8, scales="block", group_size=128, scale_format="e8m0").name == "mxfp8"
    eight = tuple(float(n) for n in range(8))
    assert (replace(NAMED["codebook4"], codebook=eight).name, replace(NAMED["codebook4"], codebook=eight).bits) == (
        "codebook3",
        3,
    )


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_a_name_is_declared_for_itself_alone(name):
    spec = LinearSpec(
        in_features=128, out_features=8, parts=(LinearPart(name="w", offset=0, rows=8),), dtype="bfloat16",
        scheme=NAMED[name],
    )  # fmt: skip
    assert undeclared(spec, Capabilities()) == []
    assert undeclared(spec, Capabilities(quantization=frozenset({name}))) == []
    (reason,) = undeclared(spec, Capabilities(quantization=SCHEMES - {name}))
    assert reason.startswith(f"quantization {name}; ")
