"""Continues two texts on whatever device is here: the engine in this process.

python examples/generate.py [MODEL]
"""

from __future__ import annotations

import sys

from anychip import LLM, SamplingParams


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "quickstart"
    with LLM(model) as llm:
        sampling = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=48)
        for output in llm.generate(["def fibonacci(n):", "import numpy as np\n"], sampling):
            print(f"--- {output.outputs[0].finish_reason}")
            print(output.outputs[0].text)


if __name__ == "__main__":
    main()
