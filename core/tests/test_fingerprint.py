"""A checkpoint's file is told from others whose sizes and times are the same."""

from __future__ import annotations

import os

import pytest

from anychip.weights.fingerprint import fingerprint


@pytest.mark.parametrize("size", [0, 1, 5000, 1_000_000])
def test_a_file_is_itself_until_it_changes(tmp_path, size):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(size))
    assert fingerprint(path) == fingerprint(path)


def test_other_values_of_one_size_and_time_are_another_file(tmp_path):
    found = set()
    for value in range(3):
        path = tmp_path / "model.safetensors"
        path.write_bytes(bytes([value]) * 100_000)
        os.utime(path, (1, 1))
        found.add(fingerprint(path))
    assert len(found) == 3


def test_one_byte_that_no_sample_holds_is_another_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(1_000_000))
    os.utime(path, (1, 1))
    before = fingerprint(path)
    with path.open("r+b") as file:
        file.seek(10_000)
        file.write(b"x")
    os.utime(path, (1, 1))
    assert fingerprint(path) != before
