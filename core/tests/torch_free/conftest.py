"""These tests need no torch: they also run where it cannot be imported (test_without_torch.py)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # engine_kit, shared by the files here
