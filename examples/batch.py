"""Answers many conversations at once, and prints each as it ends: one engine, continuous batching.

python examples/batch.py [MODEL]
"""

from __future__ import annotations

import sys

from anychip import LLM

QUESTIONS = ["How do I reverse a list?", "What does zip do?", "How do I read a file?", "What is a tuple?"]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "quickstart"
    with LLM(model) as llm:
        conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
        sampling = llm.default_sampling(temperature=0, max_tokens=24)
        for question, output in zip(QUESTIONS, llm.chat_batch(conversations, sampling), strict=True):
            print(f"--- {question}\n{output.outputs[0].text}")


if __name__ == "__main__":
    main()
