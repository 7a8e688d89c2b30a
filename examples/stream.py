"""Prints several continuations token by token, each on the line of its prompt's number, as they come.

python examples/stream.py [MODEL]
"""

from __future__ import annotations

import sys

from anychip import LLM, SamplingParams

PROMPTS = ["import numpy as", "def main(", "class Node:"]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "quickstart"
    with LLM(model) as llm:
        for output in llm.stream_batch(PROMPTS, SamplingParams(temperature=0, max_tokens=8)):
            piece = output.outputs[0]
            print(f"--- {output.request_id}: {piece.text!r}" + (" (end)" if output.finished else ""))


if __name__ == "__main__":
    main()
