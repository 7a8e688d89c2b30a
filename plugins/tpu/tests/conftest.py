"""Makes host_runtime.py, which several files here share, importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
