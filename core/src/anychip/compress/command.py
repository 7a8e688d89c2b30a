"""`anychip quantize`: makes a quantized checkpoint of a plain one, and says what that cost."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from anychip.compress.targets import target
from anychip.compress.texts import cut, perplexity, read_texts
from anychip.config import EngineConfig
from anychip.entrypoints.cli.serve import size
from anychip.environment import Environment
from anychip.errors import ConfigError
from anychip.hub import resolve_folder
from anychip.launch.build import load_tokenizer
from anychip.launch.llm import LLM
from anychip.model_config import load_model_config

try:
    from anychip.compress.quantize import MatrixReport, quantize
except ModuleNotFoundError as error:
    raise ConfigError(
        "`anychip quantize` runs transformers' code, which is not installed: pip install anychip[transformers]"
    ) from error

REPORT = "quantization_report.json"


def add_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    parser.add_argument("model", help="folder or hub repository of a plain checkpoint")
    parser.add_argument("--scheme", required=True, metavar="NAME", help="int4, int8, int8-w8a8, fp8 or fp8-w8a16")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="made by this command")
    parser.add_argument(
        "--method", choices=["auto", "rtn", "gptq", "awq", "smoothquant"], default="auto",
        help="rtn: round to nearest; the others need --calibration, with which gptq is the default",
    )  # fmt: skip
    parser.add_argument("--calibration", type=Path, metavar="FILE", help='texts, or *.jsonl with "text" in each line')
    parser.add_argument("--kv-scales", choices=["fp8", "int8"], help="scales of a KV cache of that --kv-cache-dtype")
    parser.add_argument("--samples", type=int, default=128, help="pieces of the calibration texts")
    parser.add_argument("--length", type=int, default=512, help="tokens of a piece")
    parser.add_argument("--torch-device", default="cpu", help="where layers are computed: cpu, cuda, npu, ...")
    parser.add_argument(
        "--evaluate", type=Path, metavar="FILE", help="texts to take the perplexity of, before and after"
    )
    parser.add_argument("--device", default=environment.device, help="that serves the models for --evaluate")


def run(arguments: argparse.Namespace) -> int:
    chosen = target(arguments.scheme)
    for name in ("samples", "length"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} is {getattr(arguments, name)}; expected 1 or more")
    method = arguments.method
    if method == "auto":
        method = "rtn" if arguments.calibration is None else "gptq"
    needs = f"--method {method}" if method != "rtn" else "--kv-scales" if arguments.kv_scales else None
    if needs is not None and arguments.calibration is None:
        raise ConfigError(f"{needs} looks at what layers are fed: give it texts, --calibration FILE")
    source = resolve_folder(arguments.model)
    texts: Sequence[Sequence[int]] = ()
    if needs is not None:
        tokenizer = load_tokenizer(EngineConfig(model=str(source)), load_model_config(str(source)))
        length, most = arguments.length, arguments.samples
        texts = cut(read_texts(arguments.calibration), tokenizer, length=length, most=most)
    console = Console(highlight=False, soft_wrap=True)
    with Progress(console=console) as progress:
        task = progress.add_task("matrices", total=None)
        reports = quantize(
            source,
            arguments.output,
            chosen,
            method,
            [torch.tensor(piece) for piece in texts],
            torch.device(arguments.torch_device),
            lambda done, total: progress.update(task, completed=done, total=total),
            arguments.kv_scales,
        )
    found = None
    if arguments.evaluate is not None:
        found = tuple(_perplexity(str(folder), arguments) for folder in (source, arguments.output))
    document = {"scheme": arguments.scheme, "perplexity": found, "matrices": reports}
    (arguments.output / REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(document)))
    _show(console, reports)
    if found is not None:
        console.print(f"perplexity {found[0]:.3f} before, {found[1]:.3f} after")
    console.print(f"{_size(source)} before, {_size(arguments.output)} after: {escape(str(arguments.output))}")
    return 0


def _perplexity(model: str, arguments: argparse.Namespace) -> float:
    with LLM(model, device=arguments.device, executor="inline") as llm:
        assert llm.tokenizer is not None
        length = min(arguments.length, llm.engine.max_model_len - 1)
        pieces = cut(read_texts(arguments.evaluate), llm.tokenizer, length=length, most=arguments.samples)
        return perplexity(llm, pieces)


def _size(folder: Path) -> str:
    return size(sum(path.stat().st_size for path in folder.glob("*.safetensors")))


def _show(console: Console, reports: Mapping[str, MatrixReport]) -> None:
    """Errors by the last part of a name: all layers' q_proj in one row."""
    table = Table("matrices", "method", "count", "error of weights", "of outputs", "worst", box=None, padding=(0, 2))
    kinds = sorted({(name.rpartition(".")[2], report.method) for name, report in reports.items()})
    for kind, method in kinds:
        mine = [r for name, r in reports.items() if name.rpartition(".")[2] == kind and r.method == method]
        outputs = [report.output_error for report in mine if report.output_error is not None]
        table.add_row(
            escape(kind),
            method,
            str(len(mine)),
            f"{statistics.mean(report.weight_error for report in mine):.4f}",
            f"{statistics.mean(outputs):.4f}" if outputs else "",
            f"{max(outputs):.4f}" if outputs else "",
        )
    console.print(table)
