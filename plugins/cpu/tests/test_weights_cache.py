"""Packed weights on disk: what is kept comes back, and what does not fit is passed over in one line."""

from __future__ import annotations

import json

import pytest
import torch

from anychip import LLM, SamplingParams
from anychip.plugin_api import WeightsKey
from anychip_cpu.memory import HUGE_PAGE, zeroed
from anychip_cpu.weights_cache import WeightsCache

KEY = WeightsKey(name="model", contents="files")


def tensors() -> list[torch.Tensor]:
    """Mapped ones, one with an end that is no whole page, and one too small to be mapped."""
    return [zeroed(2 * HUGE_PAGE), zeroed(2 * HUGE_PAGE + 5000), torch.zeros(7, dtype=torch.uint8)]


def held(tensors: list[torch.Tensor]) -> list[torch.UntypedStorage]:
    return [tensor.untyped_storage() for tensor in tensors]


@pytest.fixture
def cache(tmp_path):
    cache = WeightsCache(tmp_path / "kept", "avx2")
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
    assert [path.name for path in folder.iterdir()] == ["model.weights"]


def test_nothing_kept_is_nothing_said(tmp_path, caplog):
    assert not WeightsCache(tmp_path, "avx2").restore(KEY, held(tensors()))
    assert not caplog.records


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
    assert [record.message for record in caplog.records if why in record.message and "ignored" in record.message]
    assert len(caplog.records) == 1
    assert not any(tensor.any() for tensor in found)


def test_a_folder_that_cannot_be_written_to_costs_a_line(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    WeightsCache(tmp_path / "file", "avx2").keep(KEY, held(tensors()))
    assert "are not kept" in caplog.text


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
