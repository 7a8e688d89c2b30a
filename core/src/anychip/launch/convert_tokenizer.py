"""python -m anychip.launch.convert_tokenizer FOLDER TARGET: writes the tokenizer.json that a checkpoint lacks."""

from __future__ import annotations

import sys

from transformers import AutoTokenizer


def main(folder: str, target: str) -> None:
    AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
