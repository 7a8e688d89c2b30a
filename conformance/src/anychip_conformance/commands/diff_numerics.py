"""`anychip diff-numerics MODEL --device A --against B`: the same tokens on two devices, layer by layer.

Each layer of A is fed with what B's layers gave, so an error belongs to the layer that shows it; beside that stands the
error that A's own layers have gathered. Both are relative to the norm of B's stream. A device of the step seam runs its
own step program, whose log-probabilities are compared; where they differ, models of the first layers find the layer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from anychip.config import EngineConfig
from anychip.entrypoints.cli.options import parse_device_options
from anychip.errors import ConfigError
from anychip.hub import located
from anychip.model_config import load_model_config
from anychip.tokenizer.tokenizer import Tokenizer
from anychip_conformance.device import manifest_of
from anychip_conformance.layer_errors import LayerError, compare

_TEXT = "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fib"
_MAX_TOKENS = 64


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="quickstart", help="checkpoint folder or hub repository")
    parser.add_argument("--device", required=True, help="the device in question")
    parser.add_argument("--against", required=True, help="the device that is trusted, such as cpu")
    parser.add_argument("--device-opt", action="append", default=[], metavar="KEY=VALUE", help="an option of --device")
    parser.add_argument("--dtype", default="float32", help="both compute in it (default: float32)")
    parser.add_argument("--prompt", default=_TEXT, help="the text whose tokens are run")
    parser.add_argument("--tokens", help="token ids instead, separated by commas: no tokenizer is needed")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(arguments: argparse.Namespace) -> int:
    """1 where a layer is beyond its bound."""
    for name in (arguments.device, arguments.against):
        manifest_of(name)
    config = located(EngineConfig(model=arguments.model, dtype=arguments.dtype))
    tokens = token_ids(arguments, config)
    options = parse_device_options(arguments.device_opt)
    with tempfile.TemporaryDirectory(prefix="anychip-layers-") as folder:
        rows = compare(config, arguments.device, options, arguments.against, tokens, Path(folder))
    first = next((row.name for row in rows if row.beyond), None)
    if arguments.json:
        document = {"device": arguments.device, "against": arguments.against, "tokens": tokens, "layers": rows,
                    "first_beyond": first}  # fmt: skip
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n")
    else:
        show(rows, first, arguments.device, arguments.against)
    return 0 if first is None else 1


def token_ids(arguments: argparse.Namespace, config: EngineConfig) -> list[int]:
    """Raises ConfigError for ids that are no numbers or beyond the vocabulary."""
    model = load_model_config(config.model)
    if arguments.tokens is None:
        return Tokenizer.load(config.model, model.vocab_size).encode(arguments.prompt)[:_MAX_TOKENS]
    try:
        ids = [int(text) for text in arguments.tokens.split(",")]
    except ValueError as error:
        raise ConfigError(f"--tokens {arguments.tokens!r}: {error}; write ids such as 1,15,42") from error
    if not all(0 <= id < model.vocab_size for id in ids):
        raise ConfigError(f"--tokens: ids are 0 to {model.vocab_size - 1}, the model's vocabulary")
    return ids


def show(rows: list[LayerError], first: str | None, device: str, against: str) -> None:
    table = Table("", "own error", "gathered", "bound", "", title=f"{device} against {against}", title_justify="left")
    for row in rows:
        own = "-" if row.own is None else f"{row.own:.2e}"
        table.add_row(row.name, own, f"{row.gathered:.2e}", f"{row.bound:.2e}", "beyond" if row.beyond else "")
    console = Console()
    console.print(table)
    console.print(f"first beyond its bound: {first}" if first else "every layer is within its bound")
