"""Makes served.py, which several files here share, importable, and has their fixtures. These import what needs torch by
themselves: torch_free/ loads this file too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from judged import Oracles


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    from judged import Oracles

    return Oracles(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of an engine are threads of this process."""
    from thread_ranks import RankThread

    monkeypatch.setattr("anychip.launch.build.Child", RankThread)
