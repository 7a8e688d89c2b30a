"""The search for tiles, with times that are made up: the fastest that runs is written, and read again."""

from __future__ import annotations

import argparse
import json
import math
from concurrent.futures import Future

import pytest

from anychip_triton import tune
from anychip_triton.ahead import RecordingLauncher
from anychip_triton.compilers import Compilers
from anychip_triton.problems import product
from anychip_triton.searches import Search, searches
from anychip_triton.targets import TARGETS
from anychip_triton.tiles import MeasuredTable, TileTable, load_table, shipped_table

SM_80 = TARGETS["sm_80"]
TILES = [{"block_m": 16, "block_n": n, "block_k": 64, "num_warps": 4, "num_stages": 2} for n in (16, 32, 64, 128)]
NOW = {"triton": "3.7.1", "driver": "580"}
BOUNDS = {"rows": 16, "gated": 0, "features": 64, "columns": 64, "item": 2, "quantized": 0}


def problem(launch, place="meta", *, rows=16, features=64):
    """A product's, as small as can be."""
    product(launch, place, rows=rows, columns=64, features=features)


def small(**bounds):
    return Search("matmul", BOUNDS | bounds, [problem], TILES)


class Times:
    """`Measure` by the width of a tile; keeps what it was asked."""

    def __init__(self, ms):
        self.ms, self.asked = ms, []

    def __call__(self, kernel, problem, table, repeats):
        width = table.entries[kernel][0]["block_n"]
        self.asked.append((width, repeats))
        return self.ms[width]


def found(times, shipped=1, problems=1):
    search = Search("matmul", BOUNDS, [problem] * problems, TILES)
    return tune.fastest(search, TILES, shipped, shipped_table("sm_80"), times)


def test_the_fastest_tile_is_kept_and_one_that_cannot_run_is_not():
    best = found(Times({16: 3.0, 32: 2.0, 64: 1.0, 128: math.inf}), problems=2)
    assert best == tune.Found(TILES[2], [1.0, 1.0], [3.0, 3.0])


def test_where_nothing_runs_nothing_is_found():
    assert found(Times(dict.fromkeys((16, 32, 64, 128), math.inf))) is None


def test_the_shipped_tile_stays_unless_another_is_clearly_faster():
    assert found(Times({16: 1.0, 32: 0.995, 64: 1.5, 128: 2.0})).tile == TILES[0]
    assert found(Times({16: 1.0, 32: 0.98, 64: 1.5, 128: 2.0})).tile == TILES[1]
    assert found(Times({16: math.inf, 32: 3.0, 64: 2.0, 128: 4.0})).tile == TILES[2], "it does not run"


def test_only_tiles_near_the_best_are_timed_often():
    times = Times({16: 5.0, 32: 1.1, 64: 1.0, 128: 1.3})
    found(times)
    assert [width for width, repeats in times.asked if repeats == 3] == [16, 32, 64, 128]
    assert sorted(width for width, repeats in times.asked if repeats == 20) == [16, 32, 64], "16 is what is shipped"


def test_every_problem_counts_alike():
    class ByRows(Times):
        def __call__(self, kernel, problem, table, repeats):
            return super().__call__(kernel, problem, table, repeats)[problem.keywords["rows"]]

    from functools import partial

    search = Search("matmul", BOUNDS, [partial(problem, rows=1), partial(problem, rows=16)], TILES[:2])
    times = ByRows({16: {1: 0.01, 16: 10.0}, 32: {1: 0.005, 16: 11.0}})
    times_of = tune.fastest(
        search, TILES[:2], 1, shipped_table("sm_80"), lambda k, p, t, r: times.ms[t.entries[k][0]["block_n"]][
            p.keywords["rows"]
        ]
    )  # fmt: skip
    assert times_of.tile == TILES[1]


def test_each_search_is_written_when_it_is_done_and_not_done_again(tmp_path):
    narrow, wide = small(), small(features=4096)
    said = []

    class Cut(Times):
        def __call__(self, *asked):
            if len(self.asked) == self.most:
                raise KeyboardInterrupt
            return super().__call__(*asked)

    times = Cut({16: 0.5, 32: 2.0, 64: 1.0, 128: 3.0})
    times.most = 8
    with pytest.raises(KeyboardInterrupt):
        tune.tune([wide, narrow], SM_80, times, MeasuredTable.open("sm_80", NOW, tmp_path), said.append)
    asked = {"rows": 16, "gated": 0, "item": 2, "quantized": 0, "bits": 16, "grouped": 0}
    table, shipped = load_table("sm_80", NOW, tmp_path), shipped_table("sm_80")
    assert table.tile("matmul", **asked, features=4096, columns=64) == TILES[0]
    small_one = {**asked, "features": 64, "columns": 64}
    assert table.tile("matmul", **small_one) == shipped.tile("matmul", **small_one), "a wider search's is not for it"

    times.most, times.asked = 100, []
    tune.tune([wide, narrow], SM_80, times, MeasuredTable.open("sm_80", NOW, tmp_path), said.append)
    assert load_table("sm_80", NOW, tmp_path).tile("matmul", **small_one) == TILES[0]
    assert times.asked and sum(repeats == 3 for _, repeats in times.asked) == 5, "four tiles and the shipped one"
    assert any("1 searches are in" in line for line in said)
    table = json.loads((tmp_path / "sm_80.json").read_text())
    assert [entry["up_to"]["features"] for entry in table["kernels"]["matmul"]] == [64, 4096]
    assert [done["up_to"]["features"] for done in table["searched"]] == [4096, 64]
    assert list(tmp_path.iterdir()) == [tmp_path / "sm_80.json"]


def test_a_table_of_other_versions_is_replaced(tmp_path):
    times = Times({16: 0.5, 32: 2.0, 64: 1.0, 128: 3.0})
    for versions in (NOW, NOW | {"driver": "999"}):
        table = MeasuredTable.open("sm_80", versions, tmp_path)
        assert table.searched == []
        tune.tune([small()], SM_80, times, table, [].append)
    assert json.loads((tmp_path / "sm_80.json").read_text())["made_with"]["driver"] == "999"


def test_no_search_begins_after_the_time(tmp_path):
    times, said = Times({}), []
    tune.tune([small()], SM_80, times, MeasuredTable.open("sm_80", NOW, tmp_path), said.append, seconds=0)
    assert times.asked == [] and said == ["the time is over: 1 searches are left\n"]


def test_what_does_not_compile_is_not_timed(tmp_path):
    def compiled(kernel, problems, tile):
        made = Future()
        if tile["block_n"] == 64:
            made.set_exception(ValueError("no such layout\nat all"))
        else:
            made.set_result(1)
        return made

    times, said = Times({16: 0.5, 32: 2.0, 64: 0.1, 128: 3.0}), []
    table = MeasuredTable.open("sm_80", NOW, tmp_path)
    tune.tune([small()], SM_80, times, table, said.append, compile_=compiled)
    assert table.entries["matmul"] == [{"up_to": BOUNDS, **TILES[0]}]
    assert 64 not in {width for width, _ in times.asked}
    assert "1 tiles do not compile (ValueError: no such layout)" in said[-1]


def test_tiles_compile_in_processes_and_one_that_cannot_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compilers = Compilers(1)
    try:
        begin = [compilers.begin("sm_80", ("cuda", 80, 32), "matmul", [problem], tile) for tile in
                 (TILES[1], TILES[1] | {"block_n": 24})]  # fmt: skip
        assert begin[0].result() == 1
        assert begin[1].exception() is not None
    finally:
        compilers.close()
    assert list(tmp_path.rglob("*.cubin"))


def test_every_search_reaches_the_kernel_that_it_names_with_every_tile():
    for search in searches(SM_80.shared_bytes):
        for tile in (search.candidates[0], search.candidates[-1]):
            table = shipped_table("sm_80").only(search.kernel, tile)
            for wanted in search.problems:
                recorder = RecordingLauncher(SM_80, table)
                wanted(recorder)
                names = [launch.kernel.__name__ for launch in recorder.launches]
                assert any(name.endswith(search.kernel) for name in names), f"{search.kernel} is not among {names}"


def test_every_problem_is_given_its_own_searchs_tile(tmp_path):
    """When all are written: the narrower entries come first, whatever the order of the searches."""
    measured = MeasuredTable.open("sm_80", NOW, tmp_path)
    wanted = list(searches(SM_80.shared_bytes))
    for number, search in enumerate(wanted):
        measured.add(search.kernel, search.up_to, {**search.candidates[0], "num_stages": 100 + number})
    table = load_table("sm_80", NOW, tmp_path)
    for number, search in enumerate(wanted):
        for each in search.problems:
            recorder = RecordingLauncher(SM_80, table)
            each(recorder)
            stages = {
                launch.options["num_stages"]
                for launch in recorder.launches if launch.kernel.__name__.endswith(search.kernel)
            }  # fmt: skip
            assert stages == {100 + number}, search.name


@pytest.mark.parametrize("target", ["sm_80", "sm_80", "gfx942"])
def test_a_searchs_shipped_tile_is_the_first_and_there_is_one(target):
    for search in searches(TARGETS[target].shared_bytes):
        tiles, shipped = tune.tiles_of(search, TARGETS[target])
        assert shipped == 1 and len(tiles) > 2, search.name


def test_kernels_are_chosen_by_name():
    assert {search.kernel for search in tune.chosen("attention,matmul", SM_80)} == {"attention", "matmul"}
    assert len(tune.chosen("", SM_80)) == len(list(searches(SM_80.shared_bytes)))
    with pytest.raises(ValueError, match="no search for sample; there are attention, expert_matmul, matmul"):
        tune.chosen("sample", SM_80)


def options(**given):
    return argparse.Namespace(device="cuda", folder=None, only="", minutes=math.inf, again=False, **given)


def test_the_command_writes_what_the_platform_reads(tmp_path, monkeypatch, capsys):
    class Opened:
        launch = RecordingLauncher(SM_80)
        default_device = "meta"

        def made_with(self):
            return NOW

    monkeypatch.setattr(tune, "open_platform", lambda name: Opened())
    monkeypatch.setattr(tune, "_compilers", lambda: None)
    monkeypatch.setattr(tune, "searches", lambda shared_bytes: [small()])
    monkeypatch.setattr(tune, "DeviceMeasure", lambda *_: Times({16: 0.5, 32: 2.0, 64: 1.0, 128: 3.0}))
    arguments = options()
    arguments.folder = tmp_path
    assert tune.run(arguments) == 0
    assert str(tmp_path / "sm_80.json") in capsys.readouterr().out
    recorder = RecordingLauncher(SM_80, load_table("sm_80", NOW, tmp_path))
    problem(recorder)
    assert recorder.launches[-1].arguments["BLOCK_N"] == 16
    assert isinstance(recorder.tiles, TileTable)
    assert tune.run(arguments) == 0 and "1 searches are in" in capsys.readouterr().out
    arguments.again = True
    assert tune.run(arguments) == 0 and "1 searches are in" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cuda", "rocm"])
def test_without_the_device_the_command_says_why(name, capsys, monkeypatch):
    def none(dotted):
        from anychip.plugin_api import ProbeResult

        return lambda: ProbeResult(reason="no driver", remedy="install it")

    monkeypatch.setattr(tune, "_named", none)
    monkeypatch.setattr(tune, "_compilers", lambda: None)
    arguments = options()
    arguments.device = name
    assert tune.run(arguments) == 2
    assert capsys.readouterr().err == f"anychip: {name}: no driver; install it\n"
