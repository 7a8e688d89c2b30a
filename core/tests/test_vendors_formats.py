"""What the packages that write these formats make of them, where they are installed: bit for bit the same."""

from __future__ import annotations

import json

import pytest
import torch
from published_formats import FORMATS
from test_published_formats import read_share

from anychip.weights.matrix import Span

pytestmark = pytest.mark.full
SHAPE = (96, 128)


def whole(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return read_share(name, tensors, SHAPE, Span(0, SHAPE[0]), Span(0, SHAPE[1]))


@pytest.mark.parametrize(("kind", "double"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_bitsandbytes_four_bits(kind, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        torch.randn(SHAPE), blocksize=64, compress_statistics=double, quant_type=kind
    )
    parts = {f"m.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    found = whole(f"bnb-{kind}", {"m.weight": packed, **parts})
    assert found.equal(functional.dequantize_4bit(packed, state))


def test_bitsandbytes_eight_bits_up_to_the_rounding_of_one_product():
    functional = pytest.importorskip("bitsandbytes.functional")
    values, greatest, _ = functional.int8_vectorwise_quant(torch.randn(SHAPE).half())
    found = whole("bnb-int8", {"m.weight": values, "m.SCB": greatest})
    # The package multiplies by the scale first and then by 1 / 127; a scale here is both.
    torch.testing.assert_close(found, functional.int8_vectorwise_dequant(values, greatest), rtol=2**-22, atol=0)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_hqq(bits):
    quantize = pytest.importorskip("hqq.core.quantize")
    held, meta = quantize.Quantizer.quantize(
        torch.randn(SHAPE), nbits=bits, group_size=32, axis=1, device="cpu", compute_dtype=torch.float32
    )
    tensors = {"m.W_q": held, "m.scale": meta["scale"], "m.zero": meta["zero"]}
    assert whole(f"hqq-{bits}", tensors).equal(
        quantize.Quantizer.dequantize(held, {**meta, "compute_dtype": torch.float32})
    )


def test_compressed_tensors_mxfp8():
    base = pytest.importorskip("compressed_tensors.compressors.mxfp8.base")
    scheme_of = pytest.importorskip("compressed_tensors.quantization").QuantizationScheme
    stored, _ = FORMATS["ct-mxfp8"][0](torch.randn(SHAPE))
    group = json.loads(json.dumps(FORMATS["ct-mxfp8"][2]["config_groups"]["group_0"]))
    theirs = base.MXFP8QuantizationCompressor.decompress(dict(stored), scheme_of(**group))["weight"]
    found = whole("ct-mxfp8", {f"m.{name}": tensor for name, tensor in stored.items()})
    assert found.equal(theirs.float())
