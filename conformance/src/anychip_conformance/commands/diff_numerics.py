"""`anychip diff-numerics MODEL --device A --against B`: the same tokens on two devices, layer by layer.

Each layer of A is fed with what B's layers gave, so an error belongs to the layer that shows it; beside that stands the
error that A's own layers have gathered. Both are relative to the norm of B's stream.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from anychip.config import EngineConfig
from anychip.errors import ConfigError, DeviceUnavailable
from anychip.hub import located
from anychip.model_config import load_model_config
from anychip.tokenizer.tokenizer import Tokenizer

_TEXT = "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fib"
_MAX_TOKENS = 64


class LayerError(msgspec.Struct, frozen=True, kw_only=True):
    """`own`: fed with the other device's input; `gathered`: with its own. None for the logits, which are not fed."""

    name: str
    own: float | None
    gathered: float
    bound: float

    @property
    def beyond(self) -> bool:
        error = self.gathered if self.own is None else self.own
        return not error <= self.bound  # NaN is beyond


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
    from anychip_conformance.device import manifest_of, parse_options

    for name in (arguments.device, arguments.against):
        manifest_of(name)
    config = located(EngineConfig(model=arguments.model, dtype=arguments.dtype))
    tokens = token_ids(arguments, config)
    options = parse_options(arguments.device_opt)
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


def compare(
    config: EngineConfig, device: str, options: dict[str, str], against: str, tokens: list[int], folder: Path
) -> list[LayerError]:
    """Records B, then A fed with B, then A by itself, each in a process of its own."""
    from safetensors.torch import load_file

    from anychip_conformance.layerwise import Recording

    def recorded(name: str, which: str, given: dict[str, str], fed: str = "") -> str:
        out = str(folder / f"{name}.safetensors")
        task = Recording(
            device=which, options=given, model=config.model, dtype=config.dtype, tokens=tokens, out=out, fed=fed
        )
        command = [sys.executable, "-m", "anychip_conformance.layerwise"]
        done = subprocess.run(command, input=msgspec.json.encode(task), stderr=subprocess.PIPE)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
            raise DeviceUnavailable(f"running the model on {which} failed: {lines[-1]}")
        return out

    trusted = recorded("trusted", against, {})
    own = load_file(recorded("own", device, options, trusted))
    gathered = load_file(recorded("gathered", device, options))
    return errors(load_file(trusted), own, gathered, load_model_config(config.model).hidden_size, config.dtype)


def errors(
    trusted: dict[str, object], own: dict[str, object], gathered: dict[str, object], hidden_size: int, dtype: str
) -> list[LayerError]:
    """By layer, in order, and of the logits at last."""
    from anychip_conformance.layerwise import LOGITS
    from anychip_conformance.oracle.streams import stream_bound

    def stream(found: dict[str, object], layer: int):  # type: ignore[no-untyped-def]
        return found[f"hidden.{layer}"].double() + found[f"residual.{layer}"].double()  # type: ignore[attr-defined]

    def relative(a, b) -> float:  # type: ignore[no-untyped-def]
        return float((a - b).norm() / b.norm())

    count = sum(name.startswith("hidden.") for name in trusted)
    rows = [
        LayerError(
            name=f"layer {layer}",
            own=relative(stream(own, layer), stream(trusted, layer)),
            gathered=relative(stream(gathered, layer), stream(trusted, layer)),
            bound=stream_bound(1, hidden_size, dtype),
        )
        for layer in range(count)
    ]
    last = relative(gathered[LOGITS].double(), trusted[LOGITS].double())  # type: ignore[attr-defined]
    return [
        *rows,
        LayerError(name=LOGITS, own=None, gathered=last, bound=stream_bound(max(1, count), hidden_size, dtype)),
    ]


def show(rows: list[LayerError], first: str | None, device: str, against: str) -> None:
    table = Table("", "own error", "gathered", "bound", "", title=f"{device} against {against}", title_justify="left")
    for row in rows:
        own = "-" if row.own is None else f"{row.own:.2e}"
        table.add_row(row.name, own, f"{row.gathered:.2e}", f"{row.bound:.2e}", "beyond" if row.beyond else "")
    console = Console()
    console.print(table)
    console.print(f"first beyond its bound: {first}" if first else "every layer is within its bound")
