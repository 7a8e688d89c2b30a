"""The search for tiles, with times that are made up: the fastest that runs is written, and read again."""

from __future__ import annotations

import argparse
import json
import math

import pytest

from anychip_triton import tune
from anychip_triton.ahead import RecordingLauncher
from anychip_triton.targets import TARGETS
from anychip_triton.tiles import TileTable, load_table, shipped_table

TILES = [{"block_m": 16, "block_n": n, "block_k": 64, "num_warps": 4, "num_stages": 2} for n in (16, 32, 64, 128)]


def problem(launch, place="meta"):
    """A stand-in: nothing is run."""


def time_of(times):
    """By the width of the tile that a table has for a product."""
    return lambda kernel, problem, table: times[
        table.tile(kernel, rows=16, item=2, quantized=1, bits=4, grouped=1)["block_n"]
    ]


def test_the_fastest_tile_is_kept_and_one_that_cannot_run_is_not():
    search = tune.Search("matmul", {"rows": 16}, [problem, problem], TILES)
    said = []
    entries = tune.tuned("sm_90", [search], time_of({16: 3.0, 32: 2.0, 64: 1.0, 128: math.inf}), said.append)
    assert entries == {"matmul": [{"up_to": {"rows": 16}, **TILES[2]}]}
    assert "2.000 ms with" in said[0] and "4.000 ms with what is shipped" in said[0]


def test_where_nothing_runs_the_shipped_tile_stays():
    search = tune.Search("matmul", {"rows": 16}, [problem], TILES)
    assert tune.tuned("sm_90", [search], lambda *_: math.inf, [].append) == {}


def test_what_is_written_is_what_the_platform_reads(tmp_path, monkeypatch, capsys):
    class Opened:
        launch = RecordingLauncher(TARGETS["sm_90"])
        default_device = "meta"

        def made_with(self):
            return {"triton": "3.7.1", "driver": "580"}

    search = tune.Search("matmul", {"rows": 16}, [problem], TILES)
    monkeypatch.setattr(tune, "open_platform", lambda name: Opened())
    monkeypatch.setattr(tune, "searches", lambda: [search])
    monkeypatch.setattr(tune, "DeviceMeasure", lambda platform: time_of({16: 0.5, 32: 2.0, 64: 1.0, 128: 3.0}))
    assert tune.run(argparse.Namespace(device="cuda", folder=tmp_path)) == 0
    assert str(tmp_path / "sm_90.json") in capsys.readouterr().out
    table = load_table("sm_90", Opened().made_with(), tmp_path)
    assert table.tile("matmul", rows=16, item=2, quantized=0, bits=16, grouped=0)["block_n"] == 16
    assert table.tile("attention", dim=64, item=2, many_tokens=1) == shipped_table("sm_90").tile(
        "attention", dim=64, item=2, many_tokens=1
    )


def test_every_search_reaches_the_kernel_that_it_names_with_every_tile():
    for search in tune.searches():
        for tile in (search.candidates[0], search.candidates[-1]):
            table = TileTable("sm_90", {**shipped_table("sm_90").entries, search.kernel: [dict(tile)]})
            for wanted in search.problems:
                recorder = RecordingLauncher(TARGETS["sm_90"], table)
                wanted(recorder)
                names = [launch.kernel.__name__ for launch in recorder.launches]
                assert any(name.endswith(search.kernel) for name in names), f"{search.kernel} is not among {names}"


def test_a_searchs_bounds_hold_its_problems_and_go_from_narrow_to_wide():
    by_kernel = {}
    for search in tune.searches():
        by_kernel.setdefault(search.kernel, []).append(dict(search.up_to))
    assert by_kernel["matmul"][0] == {"rows": 16, "item": 2, "bits": 8}
    assert [bounds["rows"] for bounds in by_kernel["matmul"]] == [16, 16, 64, 4096]
    assert json.dumps(by_kernel)  # what goes into a file


@pytest.mark.parametrize("name", ["cuda", "rocm"])
def test_without_the_device_the_command_says_why(name, capsys, monkeypatch):
    def none(dotted):
        from anychip.plugin_api import ProbeResult

        return lambda: ProbeResult(reason="no driver", remedy="install it")

    monkeypatch.setattr(tune, "_named", none)
    assert tune.run(argparse.Namespace(device=name, folder=None)) == 2
    assert capsys.readouterr().err == f"anychip: {name}: no driver; install it\n"
