"""Packed weights on disk: what is kept comes back, and what does not fit is passed over in one line."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anychip import LLM, SamplingParams
from anychip.plugin_api import Unsupported, WeightsKey
from anychip_cpu.cache_folder import CacheFolder, NoRoom
from anychip_cpu.memory import HUGE_PAGE, zeroed
from anychip_cpu.weights_cache import WeightsCache, weights_cache

KEY = WeightsKey(name="model", contents="files")


def warnings(caplog):
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def tensors() -> list[torch.Tensor]:
    """Mapped ones, one with an end that is no whole page, and one too small to be mapped."""
    return [zeroed(2 * HUGE_PAGE), zeroed(2 * HUGE_PAGE + 5000), torch.zeros(7, dtype=torch.uint8)]


def kept_in(folder: Path, limit: int = 1 << 30, **settings) -> WeightsCache:
    return WeightsCache(CacheFolder(path=folder, limit=limit), "avx2", **settings)


def held(tensors: list[torch.Tensor]) -> list[torch.UntypedStorage]:
    return [tensor.untyped_storage() for tensor in tensors]


@pytest.fixture
def cache(tmp_path):
    cache = kept_in(tmp_path / "kept")
    kept = tensors()
    for number, tensor in enumerate(kept):
        tensor.random_(generator=torch.Generator().manual_seed(number))
    cache.keep(KEY, held(kept))
    return cache, kept, tmp_path / "kept"


def test_what_was_kept_comes_back_and_is_ones_own(cache):
    files, kept, folder = cache
    for _ in range(2):  # what the first start writes to its weights, the second does not see
        found = tensors()
        assert files.restore(KEY, held(found))
        for mine, theirs in zip(found, kept, strict=True):
            assert mine.equal(theirs)
            mine.zero_()
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "model.weights"]


def test_nothing_kept_is_nothing_said(tmp_path, caplog):
    assert not kept_in(tmp_path).restore(KEY, held(tensors()))
    assert not warnings(caplog)


def altered(header: dict, **values: object) -> bytes:
    return json.dumps({**header, **values}).encode() + b"\n"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda header, rest: altered(header, version="0.0, layout 0") + rest,
            "another version made it, 0.0, layout 0",
        ),
        (lambda header, rest: altered(header, machine="riscv64 generic") + rest, "another machine made it"),
        (lambda header, rest: altered(header, checkpoint="other") + rest, "has changed since"),
        (lambda header, rest: altered(header, sizes=[1]) + rest, "has changed since"),
        (lambda header, rest: altered(header) + rest[:-4096], "bytes that it should"),
        (lambda header, rest: b"\x80\x04pickle\n" + rest, "no file of packed weights"),
        (lambda header, rest: b"[1]\n" + rest, "no file of packed weights"),
        (lambda header, rest: b"", "no file of packed weights"),
    ],
)
def test_a_file_that_does_not_fit_is_ignored_with_one_line(cache, caplog, change, why):
    files, _, folder = cache
    path = folder / "model.weights"
    line, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(change(json.loads(line), rest))
    found = tensors()
    assert not files.restore(KEY, held(found))
    assert [record.message for record in warnings(caplog) if why in record.message and "ignored" in record.message]
    assert len(warnings(caplog)) == 1
    assert not any(tensor.any() for tensor in found)


def test_a_folder_that_cannot_be_written_to_costs_a_line(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    kept_in(tmp_path / "file").keep(KEY, held(tensors()))
    assert "are not kept" in caplog.text
    assert len(warnings(caplog)) == 1


# -- bounds ---------------------------------------------------------------------------------------------------------


def small(value: int) -> list[torch.UntypedStorage]:
    return held([torch.full((3 * 4096,), value, dtype=torch.uint8)])


def key(name: str) -> WeightsKey:
    return WeightsKey(name=name, contents="files")


def names(folder: Path) -> set[str]:
    return {path.stem for path in folder.iterdir() if path.suffix == ".weights"}


def test_the_least_used_go_first(tmp_path):
    cache = kept_in(tmp_path, limit=3 * 5 * 4096)  # a header's page and three pages of values each, and some
    for at, name in enumerate("abc"):
        cache.keep(key(name), small(at))
        os.utime(tmp_path / f"{name}.weights", (at, at))
    assert cache.restore(key("a"), small(9))  # so b is the one that was not used for longest
    cache.keep(key("d"), small(3))
    assert names(tmp_path) == {"a", "c", "d"}
    cache.keep(key("c"), small(7))  # its own old file is the one that makes room
    found = small(0)
    assert cache.restore(key("c"), found) and bytes(found[0])[:1] == b"\x07"
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * 5 * 4096


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 40)), max_size=12), st.integers(20, 60))
def test_the_limit_holds_whatever_comes(tmp_path_factory, files, limit):
    folder = CacheFolder(path=tmp_path_factory.mktemp("cache"), limit=limit * 4096)
    for name, pages in files:
        try:
            with folder.writing(name, pages * 4096) as file:
                file.write(b"x" * 10)
                held = sum(path.stat().st_size for path in folder.path.iterdir())
                assert held <= folder.limit
            assert folder.file(name).exists()
        except NoRoom:
            assert pages > limit


def test_weights_larger_than_the_limit_cost_a_line_and_no_file(tmp_path, caplog):
    cache = kept_in(tmp_path, limit=5 * 4096)
    cache.keep(key("a"), small(1))
    cache.keep(KEY, held(tensors()))
    assert names(tmp_path) == {"a"}
    assert [r.message for r in warnings(caplog) if "more than the limit" in r.message]
    assert len(warnings(caplog)) == 1


def test_a_full_disk_is_left_alone(tmp_path, caplog, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=usage.total // 20))
    kept_in(tmp_path).keep(KEY, small(1))
    assert not names(tmp_path)
    assert "of the file system free" in caplog.text and len(warnings(caplog)) == 1


def test_a_disk_that_fills_meanwhile_leaves_nothing_behind(tmp_path, caplog, monkeypatch):
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    kept_in(tmp_path).keep(KEY, small(1))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert "No space left" in caplog.text and len(warnings(caplog)) == 1


def test_what_a_process_left_unfinished_goes(tmp_path):
    old, new = tmp_path / "x.part", tmp_path / "y.part"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    kept_in(tmp_path).keep(KEY, small(1))
    assert not old.exists() and new.exists()


def test_another_users_folder_is_not_trusted(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mine = weights_cache("on", 1.0, "avx2")
    assert mine is not None
    mine._worth_s = 0
    mine.keep(KEY, small(1))
    assert names(tmp_path / "anychip/packed") == {"model"} and not warnings(caplog)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not mine.restore(KEY, small(0))
    mine.keep(KEY, small(2))
    assert "belongs to user" in caplog.text and len(warnings(caplog)) == 1


def test_what_packs_quickly_is_not_kept(tmp_path):
    now = [0.0]
    cache = kept_in(tmp_path, worth_s=2.0, clock=lambda: now[0])
    for seconds, kept in ((1.5, set()), (2.5, {"model"})):
        assert not cache.restore(KEY, small(0))
        now[0] += seconds
        cache.keep(KEY, small(1))
        assert names(tmp_path) == kept


def test_two_processes_write_one_model_at_once(tmp_path):
    """Both finish, and what is there afterwards is whole."""
    program = (
        "import sys, torch; from pathlib import Path; from anychip.plugin_api import WeightsKey\n"
        "from anychip_cpu.cache_folder import CacheFolder; from anychip_cpu.weights_cache import WeightsCache\n"
        "cache = WeightsCache(CacheFolder(path=Path(sys.argv[1]), limit=1 << 30), 'avx2')\n"
        "for i in range(20): cache.keep(WeightsKey(name='model', contents='files'),\n"
        "  [torch.full((300 * 4096,), int(sys.argv[2]), dtype=torch.uint8).untyped_storage()])"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, tmp_path, str(value)]) for value in (1, 2)]
    assert [writer.wait(timeout=300) for writer in writers] == [0, 0]
    found = torch.zeros(300 * 4096, dtype=torch.uint8)
    assert kept_in(tmp_path).restore(KEY, held([found]))
    assert found.eq(found[0]).all() and found[0] in (1, 2)
    assert names(tmp_path) == {"model"} and not list(tmp_path.glob("*.part"))


def test_off_keeps_nothing_and_no_room_is_refused():
    assert weights_cache("off", 1.0, "avx2") is None
    with pytest.raises(Unsupported, match="packed_weights_gib=0: no room at all"):
        weights_cache("on", 0, "avx2")


def test_a_second_start_restores_and_answers_alike(tmp_path, monkeypatch):
    restored = []
    restore = WeightsCache.restore
    monkeypatch.setattr(WeightsCache, "restore", lambda *a: restored.append(restore(*a)) or restored[-1])

    def answer() -> list[int]:
        with LLM(device="cpu", num_kv_blocks=64, device_options={"packed_weights": str(tmp_path)}) as llm:
            sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
            return llm.generate(["import numpy"], sampling)[0].outputs[0].token_ids

    assert answer() == answer()
    assert restored == [False, True]
