"""Blocks of every type, against gguf-py: bit for bit, as floats and as parts of a scheme."""

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
from anychip.weights.blocks import dequantize_rows

HELD = [name for name, stored in BY_NAME.items() if not stored.is_plain and name not in RARE]
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
    rows = random_blocks(name, 64, COLUMNS)
    assert held_in(SCHEME_OF[name], BY_NAME[name], rows).equal(theirs(name, rows))


@pytest.mark.parametrize("name", HELD)
def test_a_scheme_takes_little_more_than_a_file(name):
    """Scales of six bits take eight; those of four, which Q2_K has for each 16 weights, do too."""
    scheme, stored, rows = SCHEME_OF[name], BY_NAME[name], random_blocks(name, 4, COLUMNS)
    parts = parts_of(stored, torch.from_numpy(rows), scheme)
    values = parts.pop("").numel() * (8 if scheme.values == "int8" else scheme.bits) / 8
    assert values + sum(part.nbytes for part in parts.values()) <= (1.2 if name == "Q2_K" else 1.05) * rows.nbytes


@pytest.mark.parametrize("name", HELD)
def test_the_scheme_of_all_types_holds_each(name):
    """Experts of several types: their parts come in eight bits, in the smallest groups, with minima."""
    scheme = scheme_of_all(HELD)
    assert (scheme.name, scheme.group_size) == ("int8-minima", 16)
    rows = random_blocks(name, 64, COLUMNS)
    assert held_in(scheme, BY_NAME[name], rows).equal(theirs(name, rows))


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "Q2_K", "Q4_0", "Q4_1"])
def test_types_of_four_bits_stay_in_four_bits_together(name):
    scheme = scheme_of_all({"Q4_K", "Q3_K", "Q2_K", "Q4_0", "Q4_1"})
    assert (scheme.name, scheme.group_size) == ("int4-minima", 16)
    rows = random_blocks(name, 8, COLUMNS)
    assert held_in(scheme, BY_NAME[name], rows).equal(theirs(name, rows))


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
    return dequantize(scheme, parts.pop(""), parts.pop("scale"), **parts)
