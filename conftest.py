"""What every test shares."""

from __future__ import annotations

import atexit
import gc
import inspect
import os
import shutil
import tempfile

import pytest
from hypothesis import settings

# A time is no part of a verdict: the machine may be busy.
settings.register_profile("anychip", deadline=None)
settings.load_profile("anychip")


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Collector, name: str, obj: object) -> list[pytest.Item] | None:
    """A full product has thousands of cases: where it is deselected whole, they are not made first."""
    if collector.config.option.markexpr != "not full" or not inspect.isfunction(obj):
        return None
    return [] if any(mark.name == "full" for mark in getattr(obj, "pytestmark", ())) else None


def pytest_collection_finish() -> None:
    """An engine that closes collects garbage. It need not walk through the libraries and the tests each time."""
    gc.collect()
    gc.freeze()


# What engines keep for later starts is not kept in the user's own cache, and not beyond the run.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="anychip-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
