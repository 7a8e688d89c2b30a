"""Checkpoints that have a SentencePiece model, tokenizer.model, and no tokenizer.json.

transformers converts it, in a process of its own: this one never loads what that brings along.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from anychip.errors import CheckpointError

_CONVERTER = "anychip.launch.convert_tokenizer"
_TIMEOUT_S = 120


def convert(folder: Path) -> str:
    """The content of the tokenizer.json that the model stands for. Raises CheckpointError with what went wrong."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "tokenizer.json"
        done = subprocess.run(
            [sys.executable, "-m", _CONVERTER, str(folder), str(target)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0 or not target.is_file():
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise CheckpointError(
                f"{folder / 'tokenizer.model'} could not be converted: {reason}; it takes pip install "
                "transformers sentencepiece protobuf, or a tokenizer.json beside it"
            )
        return target.read_text()
