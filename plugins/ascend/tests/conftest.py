"""Tests that need the simulated NPU say so by a marker, and are skipped by name where torch_npu is not installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

_MISSING = [name for name in ("torch_npu", "anychip_npu_simulator") if find_spec(name) is None]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "simulated: runs over the simulated NPU, in the environment of make ascend-venv")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _MISSING:
        skip = pytest.mark.skip(reason=f"{' and '.join(_MISSING)} is not installed here: make ascend-test")
        for item in items:
            if item.get_closest_marker("simulated"):
                item.add_marker(skip)
