"""The libraries of the simulated CANN: built once, complete for the wheel, and errors that say what is missing."""

from __future__ import annotations

import importlib.util

import pytest

pytest.importorskip("anychip_npu_simulator.runtime", reason="needs torch_npu: make ascend-test", exc_type=ImportError)

from anychip_npu_simulator import cann
from anychip_npu_simulator.errors import SimulatorUnavailable


def test_the_libraries_have_every_symbol_that_the_wheel_needs(tmp_path):
    folder = cann.build(tmp_path)
    made = folder.stat().st_mtime_ns
    assert cann.build(tmp_path) == folder and folder.stat().st_mtime_ns == made
    needed = cann.missing_symbols(cann.find_wheel())
    assert "aclrtMalloc" in needed
    assert set(needed) <= cann.defined_symbols(folder / "libascendcl.so")
    assert {path.name for path in folder.glob("*.so")} >= {"libhccl.so", "libgraph.so", "libascendcl.so"}


def test_without_the_wheel_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SimulatorUnavailable, match=r"torch_npu is not installed; pip install torch==2\.13\.0"):
        cann.find_wheel()


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SimulatorUnavailable, match="gcc"):
        cann.build(tmp_path)
