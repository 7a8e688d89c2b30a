"""What `anychip plan` predicts, beside what an engine of the same configuration then holds.

python benchmarks/plan_accuracy.py MODEL [MODEL:int4 ...] [--output benchmarks/results/plan_accuracy.json]

Each prediction and each engine has a process of its own. A model's name may be followed by a quantization.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from anychip.bench.report import write

PARTS = ("weights", "activations", "graphs", "kv_cache")


def measure(kind: str, model: str, quantization: str | None) -> dict[str, int]:
    """In this process: bytes by part."""
    from anychip import LLM, EngineConfig
    from anychip.launch.plan import plan_engine

    settings: dict[str, Any] = {"device": "cpu", "quantization": quantization, "skip_tokenizer": True}
    if not list(Path(model).glob("*.safetensors")):
        settings["load_format"] = "dummy"
    if kind == "plan":
        memory = plan_engine(EngineConfig(model=model, **settings)).worker.memory
    else:
        with LLM(model, **settings) as llm:
            memory = llm.worker.memory
    return {part: getattr(memory, part) for part in PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--once", choices=["plan", "engine"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.once:
        name, _, quantization = arguments.models[0].partition(":")
        print(json.dumps(measure(arguments.once, name, quantization or None)))
        return
    rows = []
    for model in arguments.models:
        found = {}
        for kind in ("plan", "engine"):
            command = [sys.executable, __file__, model, "--once", kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[kind] = json.loads(done.stdout.splitlines()[-1])
        ratios = {part: found["plan"][part] / found["engine"][part] for part in PARTS if found["engine"][part]}
        ratios["together"] = sum(found["plan"].values()) / sum(found["engine"].values())
        rows.append({"model": Path(model).name, **found, "plan_over_engine": ratios})
        print(Path(model).name, {part: round(ratio, 4) for part, ratio in ratios.items()})
    if arguments.output:
        write(arguments.output, {"benchmark": "plan_accuracy", "models": rows})


if __name__ == "__main__":
    main()
