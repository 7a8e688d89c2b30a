"""Tile tables: which entry serves a problem; what was measured comes before what is shipped, where it was measured."""

from __future__ import annotations

import json
import logging

import pytest

from anychip_triton.targets import TARGETS, cuda_target, hip_target
from anychip_triton.tiles import TileTable, load_table, shipped_table

TABLE = TileTable(
    "t",
    {
        "k": [
            {"up_to": {"rows": 16, "dim": 64}, "block_m": 16},
            {"up_to": {"rows": 64}, "block_m": 64},
            {"block_m": 128},
        ]
    },
)
NOW = {"triton": "3.7.1", "driver": "580"}


@pytest.mark.parametrize(
    ("rows", "dim", "block"), [(1, 64, 16), (16, 64, 16), (16, 65, 64), (17, 64, 64), (64, 512, 64), (65, 1, 128)]
)
def test_the_first_entry_whose_bounds_hold_the_problem_serves_it(rows, dim, block):
    assert TABLE.tile("k", rows=rows, dim=dim) == {"block_m": block}


def test_a_problem_that_no_entry_holds_is_an_error_that_names_it():
    with pytest.raises(LookupError, match="table of t has no entry of k for {'rows': 9}"):
        TileTable("t", {"k": [{"up_to": {"rows": 8}, "block_m": 16}]}).tile("k", rows=9)


def measured(folder, made_with, name="sm_90"):
    tile = {"block_m": 16, "block_n": 999, "block_k": 64, "num_warps": 4, "num_stages": 2}
    text = json.dumps({"made_with": made_with, "kernels": {"matmul": [{"up_to": {"rows": 16}, **tile}]}})
    (folder / f"{name}.json").write_text(text)


def test_what_was_measured_on_this_machine_comes_before_what_is_shipped(tmp_path):
    measured(tmp_path, NOW)
    table = load_table("sm_90", NOW, tmp_path)
    assert table.tile("matmul", rows=16, item=2, quantized=0, bits=16, grouped=0)["block_n"] == 999
    assert table.tile("matmul", rows=17, item=2, quantized=0, bits=16, grouped=0) == shipped_table("sm_90").tile(
        "matmul", rows=17, item=2, quantized=0, bits=16, grouped=0
    )


@pytest.mark.parametrize("other", [NOW | {"driver": "999"}, NOW | {"triton": "3.6.0"}, {}])
def test_a_table_of_another_driver_or_triton_is_ignored_with_one_line(tmp_path, caplog, other):
    measured(tmp_path, other)
    with caplog.at_level(logging.WARNING):
        table = load_table("sm_90", NOW, tmp_path)
    assert table == shipped_table("sm_90")
    (record,) = caplog.records
    assert "is ignored" in record.getMessage() and "driver 580" in record.getMessage()


@pytest.mark.parametrize("text", ["", "{}", '{"made_with": {}}', "[1]"])
def test_a_table_that_is_none_is_ignored_with_one_line(tmp_path, caplog, text):
    (tmp_path / "sm_90.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert load_table("sm_90", NOW, tmp_path) == shipped_table("sm_90")
    assert len(caplog.records) == 1 and "is not a tile table" in caplog.records[0].getMessage()


@pytest.mark.parametrize("target", [*TARGETS, "interpreter"])
def test_every_target_has_a_table_of_the_same_kernels(target):
    assert shipped_table(target).entries.keys() == shipped_table("interpreter").entries.keys()


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 0), "sm_80"), ((7, 5), None)],
)
def test_a_compute_capability_has_the_target_whose_tiles_fit_it(capability, target):
    found = cuda_target(*capability)
    assert (found and found.name) == target


@pytest.mark.parametrize(
    ("name", "target"),
    [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx1100", "gfx1100"), ("gfx906", None), ("sm_90", None)],
)
def test_a_gfx_name_has_its_own_target_or_none(name, target):
    found = hip_target(name)
    assert (found and found.name) == target
