"""Blocks of every type, against gguf-py: as floats bit for bit, as parts of a scheme within the scheme's bound."""

from __future__ import annotations

import sys

import gguf
import numpy as np
import pytest
import torch
from gguf_files import random_blocks

from anychip.errors import ConfigError
from anychip.gguf.block_types import BLOCK_TYPES, BY_NAME, RARE
from anychip.ops.reference import dequantize
from anychip.quantization.ggml_schemes import AT_LOAD, SCHEME_OF, parts_of, scheme_of_all
from anychip.weights.blocks import dequantize_rows, unpack

HELD = [name for name, stored in BY_NAME.items() if not stored.is_plain and name not in RARE]
WITH_MINIMA = {"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"}
COLUMNS = 512


def theirs(name: str, rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize("stored", BLOCK_TYPES.values(), ids=lambda stored: stored.name)
def test_numbers_names_and_sizes_are_ggmls(stored):
    assert gguf.GGMLQuantizationType[stored.name] == stored.number
    assert gguf.GGML_QUANT_SIZES[stored.number] == (stored.size, stored.nbytes)


@pytest.mark.filterwarnings("ignore:.*encountered in")  # gguf-py multiplies what is no number
@pytest.mark.parametrize("name", [*HELD, *sorted(RARE)])
def test_floats_are_ggmls_bit_for_bit(name):
    """Any bytes: scales that are subnormal, negative, infinite or no numbers too."""
    stored = BY_NAME[name]
    rows = np.random.default_rng(stored.number).integers(0, 256, (128, 3 * stored.nbytes), dtype=np.uint8)
    rows[:2] = 0
    if name == "MXFP4":
        rows.reshape(-1, stored.nbytes)[:256, 0] = np.arange(256)
    ours, expected = dequantize_rows(stored, torch.from_numpy(rows)), theirs(name, rows)
    same = ours.view(torch.int32) == expected.view(torch.int32)
    # A zero's sign says nothing, nor do the bits of what is no number.
    assert bool((same | (ours == expected) | (ours.isnan() & expected.isnan())).all())
    assert not bool(expected[2:].isnan().all())


@pytest.mark.parametrize("name", HELD)
def test_a_scheme_holds_what_a_type_means(name):
    scheme, stored = SCHEME_OF[name], BY_NAME[name]
    rows = random_blocks(name, 64, COLUMNS)
    found, expected = held_in(scheme, stored, rows), theirs(name, rows)
    if name in WITH_MINIMA:
        assert_within_rounding(found, expected, name, rows)
    else:
        assert found.equal(expected)


@pytest.mark.parametrize("name", HELD)
def test_the_scheme_of_all_types_holds_each(name):
    """A product of several types: its parts come in eight bits, in the smallest groups, with zero points."""
    scheme = scheme_of_all(HELD)
    assert (scheme.name, scheme.group_size) == ("int8-float-zeros", 16)
    rows = random_blocks(name, 64, COLUMNS)
    assert_within_rounding(held_in(scheme, BY_NAME[name], rows), theirs(name, rows), name, rows)


def test_types_of_four_bits_stay_in_four_bits_together():
    scheme = scheme_of_all({"Q4_K", "Q3_K"})
    assert (scheme.name, scheme.group_size) == ("int4-float-zeros", 16)
    rows = random_blocks("Q3_K", 8, COLUMNS)
    assert held_in(scheme, BY_NAME["Q3_K"], rows).equal(theirs("Q3_K", rows))


def test_a_plain_matrix_makes_its_product_plain_and_a_rare_one_makes_it_int8():
    assert scheme_of_all({"Q4_0", None}) is None
    assert scheme_of_all({"Q4_0", "IQ2_S"}) == AT_LOAD


def test_groups_of_one_number_keep_it():
    """Their scale is 0, and a zero point is multiplied by the scale."""
    rows = random_blocks("Q4_1", 4, 64)
    blocks = rows.reshape(-1, 20)
    blocks[::2, :2] = 0
    blocks[0, 2:4] = 0
    expected = theirs("Q4_1", rows)
    assert held_in(SCHEME_OF["Q4_1"], BY_NAME["Q4_1"], rows)[:, :32].equal(expected[:, :32])


def test_rare_types_need_the_package_that_knows_their_tables(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"tensors of type IQ2_XS .* pip install anychip\[gguf\]"):
        dequantize_rows(BY_NAME["IQ2_XS"], torch.zeros(1, 74, dtype=torch.uint8))


def held_in(scheme, stored, rows: np.ndarray) -> torch.Tensor:
    parts = parts_of(stored, torch.from_numpy(rows), scheme)
    return dequantize(scheme, parts.values, parts.scale, zero=parts.zero)


def assert_within_rounding(found, expected, name: str, rows: np.ndarray) -> None:
    """2^-21 of the greater of a group's minimum and range."""
    blocks = unpack(BY_NAME[name], torch.from_numpy(rows))
    most = blocks.scales.abs() * blocks.integers().abs().amax()
    if blocks.minima is not None:
        most = torch.maximum(most, blocks.minima.abs())
    grouped = (found - expected).abs().view(*most.shape, -1)
    assert bool((grouped <= 2.0**-21 * most.unsqueeze(-1)).all())
