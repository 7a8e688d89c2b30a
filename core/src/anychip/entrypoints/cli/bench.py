"""`anychip bench throughput|latency|startup|serve`: figures as JSON, with the machine they are from."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from anychip.bench import offline, report
from anychip.bench.online import Slo, serve_load
from anychip.bench.workload import Workload
from anychip.config import EngineConfig
from anychip.entrypoints.cli.options import add_engine_options, engine_arguments, engine_config, parse_count
from anychip.environment import Environment
from anychip.errors import ConfigError
from anychip.hub import located
from anychip.model_config import load_model_config

KINDS = {
    "throughput": "all requests at once, in this process",
    "latency": "one request at a time, in this process",
    "startup": "from the command to the first healthy answer",
    "serve": "a server under load, one that is started or one that runs",
}


def add_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, summary in KINDS.items():
        kind = kinds.add_parser(name, help=summary, description=summary)
        add_engine_options(kind, environment)
        result = kind.add_argument_group("result")
        result.add_argument("--output", type=Path, metavar="FILE.json", help="figures, settings and machine")
        result.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture of the distributions")
        if name == "startup":
            kind.add_argument("--repeats", type=int, default=7)
            continue
        _add_workload(kind, num_prompts=8 if name == "latency" else 64)
        if name == "serve":
            kind.add_argument("--url", help="of a server that runs; default: one is started")
            kind.add_argument("--rate", type=_rates, default=[0.0], help="requests a second, 0: all at once; or 1,2,4")
            kind.add_argument("--slo", type=str, metavar="ttft=S,tpot=S", help="count what keeps to it: goodput")
            kind.add_argument("--concurrency", type=int, default=256, help="most open requests")
            kind.add_argument("--api-key", default=environment.api_key)
        else:
            result.add_argument("--profile", type=Path, metavar="FILE.json", help="a trace in Chrome's format")


def _add_workload(parser: argparse.ArgumentParser, *, num_prompts: int) -> None:
    workload = parser.add_argument_group("workload")
    workload.add_argument("--num-prompts", type=parse_count, default=num_prompts)
    workload.add_argument("--input-len", type=parse_count, default=128)
    workload.add_argument("--output-len", type=parse_count, default=64)
    workload.add_argument("--spread", type=float, default=0.0, help="of lengths around their mean, 0 to below 1")
    workload.add_argument("--shared", type=parse_count, default=0, help="tokens that begin every prompt")
    workload.add_argument("--mix", choices=["uniform", "chat"], default="uniform", help="of lengths and turns")
    workload.add_argument("--workload-seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> int:
    if arguments.plot is not None and arguments.kind == "throughput":
        raise ConfigError("bench throughput has no distribution to plot; latency, startup and serve do")
    config = engine_config(arguments)
    figures, settings = _measure(arguments, config)
    _show(arguments.kind, config.public_name, figures)
    if arguments.plot is not None and "rates" in figures:
        report.plot_rates(arguments.plot, f"serve: {config.public_name}", figures["rates"])
    elif arguments.plot is not None:
        report.plot(arguments.plot, f"{arguments.kind}: {config.public_name}", _curves(figures), "seconds")
    if arguments.output is not None:
        document = {"benchmark": arguments.kind, "engine": msgspec.to_builtins(config), **settings, **figures}
        report.write(arguments.output, document)
    return 0


def _curves(figures: dict[str, Any]) -> dict[str, list[float]]:
    """What is drawn: times to and between tokens, or of starts."""
    if "runs" in figures:
        return {"to the first healthy answer": [one["seconds"] for one in figures["runs"]]}
    samples = figures["samples"]
    return {"to the first token": samples["first_token_s"], "between tokens": samples["between_tokens_s"]}


def _measure(arguments: argparse.Namespace, config: EngineConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures, and what they were measured with."""
    if arguments.kind == "startup":
        with _bar(arguments.repeats, "starts") as advance:
            return offline.startup(engine_arguments(config), arguments.repeats, advance), {}
    workload = Workload(
        num_prompts=arguments.num_prompts,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        spread=arguments.spread,
        shared=arguments.shared,
        mix=arguments.mix,
        seed=arguments.workload_seed,
    )
    settings = {"workload": msgspec.to_builtins(workload)}
    runs = len(arguments.rate) if arguments.kind == "serve" else 1
    with _bar(runs * workload.num_prompts, "requests") as advance:
        if arguments.kind == "throughput":
            return offline.throughput(config, workload, advance, arguments.profile), settings
        if arguments.kind == "latency":
            return offline.latency(config, workload, advance, arguments.profile), settings
        settings |= {"concurrency": arguments.concurrency, "slo": arguments.slo}
        return _serve(arguments, config, workload, advance), settings


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate such as 4, or several: 1,2,4") from error
    if len(rates) > 1 and min(rates) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: several rates are above 0 each")
    return rates


def _serve(
    arguments: argparse.Namespace, config: EngineConfig, workload: Workload, advance: offline.Advance
) -> dict[str, Any]:
    vocab_size = load_model_config(located(config).model).vocab_size

    slo = None if arguments.slo is None else Slo.parse(arguments.slo)

    def shifted(before: int) -> offline.Advance:
        return lambda done: advance(before + done)

    def load(url: str) -> dict[str, Any]:
        runs = []
        for number, rate in enumerate(arguments.rate):
            found = serve_load(
                url,
                # A workload of its own, so that no rate finds its prompts in the prefix cache.
                msgspec.structs.replace(workload, seed=workload.seed + number),
                vocab_size=vocab_size,
                rate=rate,
                concurrency=arguments.concurrency,
                api_key=arguments.api_key,
                advance=shifted(number * workload.num_prompts),
                slo=slo,
            )
            runs.append({"rate": rate, **found})
        return runs[0] if len(runs) == 1 else {"rates": runs}

    if arguments.url:
        return load(arguments.url)
    with offline.ServerProcess(engine_arguments(config)) as server:
        return load(f"http://127.0.0.1:{server.port}")


class _bar:
    """A progress bar on standard error; entering gives the function that moves it."""

    def __init__(self, total: int, what: str) -> None:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(what, total=total)

    def __enter__(self) -> Callable[[int], None]:
        self._progress.start()
        return lambda done: self._progress.update(self._task, completed=done)

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


def _show(kind: str, model: str, figures: dict[str, Any]) -> None:
    console = Console(highlight=False)
    if "rates" in figures:
        for run in figures["rates"]:
            _show(f"{kind} at {run['rate']:g} requests a second", model, run)
        return
    console.print(f"[bold]{kind}[/]: {escape(model)}")
    single = Table(show_header=False, box=None, padding=(0, 2))
    spread = Table("", "mean", "p50", "p90", "p99", "max", box=None, padding=(0, 2))
    for name, value in figures.items():
        if isinstance(value, dict) and "p50" in value:
            scale, unit = (1e3, ", ms") if name.endswith("_s") else (1.0, "")
            spread.add_row(name.removesuffix("_s") + unit, *(f"{number * scale:.4g}" for number in value.values()))
        elif isinstance(value, int | float):
            single.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        elif isinstance(value, str):
            single.add_row(name, escape(value))
    for table in (single, spread):
        if table.row_count:
            console.print(table)
