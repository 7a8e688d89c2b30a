"""Vectors per second on the CPU: anychip's LLM.embed against sentence-transformers' encode, by length of the texts.

    python benchmarks/vectors.py --model FOLDER --rounds 5 --output benchmarks/results/cpu/vectors-minilm.json

FOLDER holds sentence-transformers' files. `--bert-base FOLDER` writes a checkpoint of BERT-base's shape with random
weights there first, with the tokenizer of `--model`, and measures that. Both run with as many threads as the process
may use; rounds alternate, and the best of each counts. On a busy machine
processor time tells more than the clock. sentence-transformers must be importable.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anychip import LLM

LENGTHS = (16, 64, 256, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--bert-base", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=8192, help="of the texts of one round; 32 texts at least")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    folder = given.model
    if given.bert_base is not None:
        folder = make_bert_base(given.model, given.bert_base)
    report = measured(folder, given.lengths, given.rounds, given.tokens)
    print(json.dumps(report, indent=2))
    if given.output is not None:
        given.output.write_text(json.dumps(report, indent=2) + "\n")


def make_bert_base(tokenizer: Path, folder: Path) -> Path:
    """Random weights in BERT-base's shape, with another checkpoint's tokenizer and modules."""
    from transformers import BertConfig, BertModel

    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    BertModel(BertConfig(architectures=["BertModel"])).save_pretrained(folder)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean", "embedding_dimension": 768}')
    return folder


def measured(folder: Path, lengths: list[int], rounds: int, tokens: int) -> dict[str, Any]:
    import sentence_transformers

    other = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    other.max_seq_length = max(lengths)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = []
    with LLM(str(folder), device="cpu", dtype="float32", max_model_len=max(lengths)) as llm:
        threads = torch.get_num_threads()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        mixed = texts_of([lengths[at % len(lengths)] for at in range(96)])
        for name, texts in [*((str(n), texts_of([n] * max(32, tokens // n))) for n in lengths), ("mixed", mixed)]:
            ours, theirs, apart = [], [], 0.0
            for _ in range(rounds):
                torch.set_num_threads(threads)
                found, took = timed(lambda texts=texts: llm.embed(texts))
                ours.append(took)
                torch.set_num_threads(len(os.sched_getaffinity(0)))
                expected, took = timed(lambda texts=texts: other.encode(texts, batch_size=32))
                theirs.append(took)
                apart = max(apart, float(np.abs(np.stack(found) - expected).max()))
            best = {"anychip": min(ours), "sentence_transformers": min(theirs)}
            busy = [min(each[1] for each in some) for some in (ours, theirs)]
            rows.append(
                {
                    "tokens": name,
                    "texts": len(texts),
                    **{f"{who}_texts_per_s": round(len(texts) / seconds, 1) for who, (seconds, _) in best.items()},
                    "ratio": round(best["sentence_transformers"][0] / best["anychip"][0], 2),
                    "processor_s": [round(seconds, 3) for seconds in busy],
                    "ratio_of_processor_time": round(busy[1] / busy[0], 2),
                    "largest_difference": apart,
                }
            )
            print(rows[-1], flush=True)
    return {
        "model": folder.name,
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "sentence_transformers": sentence_transformers.__version__,
        "rounds": rounds,
        "rows": rows,
    }


def timed(work: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """What it gives; seconds, and seconds of all processors."""
    began, busy = time.perf_counter(), time.process_time()
    found = work()
    return found, (time.perf_counter() - began, time.process_time() - busy)


def texts_of(lengths: list[int]) -> list[str]:
    """Of so many tokens each, the two special ones among them; words that are one token in BERT's vocabulary."""
    words = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school"]
    return [" ".join(words[(n * 7 + at * at) % len(words)] for at in range(n - 2)) for n in lengths]


if __name__ == "__main__":
    main()
