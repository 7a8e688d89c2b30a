"""The scheduler's and the KV cache's tests pass where torch cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is blocked here")

sys.meta_path.insert(0, Blocker())
"""


def test_torch_free_tests_pass_without_torch(tmp_path: Path) -> None:
    (tmp_path / "block_torch.py").write_text(BLOCKER)
    tests = Path(__file__).parent / "torch_free"
    # Python resolves -p before conftest files, so nothing is imported earlier than the blocker.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "block_torch", "-p", "no:anychip-conformance"]
    command += ["-p", "no:xdist", str(tests / "test_scheduler.py"), str(tests / "test_kv_manager.py")]
    command += [str(tests / "test_block_pool.py"), str(tests / "test_engine_core.py")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
