"""`anychip simulate`: what a deployment would do, on devices that need not be there."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anychip.bench.report import percentiles, write
from anychip.environment import Environment
from anychip.hub import resolve_folder
from anychip.model_config import load_model_config
from anychip.simulate.accelerator import read_accelerator
from anychip.simulate.costs import Costs, RooflineCosts, read_costs
from anychip.simulate.layout import Layout, cache_tokens, check_layout, weight_bytes
from anychip.simulate.run import Limits, Outcome, Simulation
from anychip.simulate.shape import model_shape
from anychip.simulate.traffic import Traffic


def add_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    parser.add_argument("model", help="a folder with the model's config.json; weights are not needed")
    parser.add_argument("--accelerator", type=Path, required=True, help="a JSON file: what one device can do")
    parser.add_argument(
        "--step-costs", type=Path, help="a JSON file with [[tokens, seconds], ...] that were measured, for the roofline"
    )
    parser.add_argument("--weights", default="bfloat16", help="type of the weights: bfloat16, fp8, int8 or int4")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="T")
    parser.add_argument("--pipeline-parallel-size", type=int, default=1, metavar="P")
    parser.add_argument(
        "--data-parallel-size", type=int, default=1, metavar="D", help="lanes with requests of their own"
    )
    parser.add_argument("--expert-parallel", action="store_true", help="experts lie over the ranks of all lanes")
    parser.add_argument("--imbalance", type=float, default=1.0, help="tokens of the busiest expert rank over the mean")
    parser.add_argument("--num-requests", type=int, default=256)
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--spread", type=float, default=0.0, help="0.5: lengths are within 50 %% around their means")
    parser.add_argument("--rate", type=float, help="requests a second; all at once by default")
    parser.add_argument("--phase", choices=("both", "prefill", "decode"), default="both")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="rows of one lane")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192, help="tokens of one lane's step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a file for the result, as JSON")


def run(arguments: argparse.Namespace) -> int:
    accelerator = read_accelerator(arguments.accelerator)
    config = load_model_config(str(resolve_folder(arguments.model)))
    shape = model_shape(config, arguments.weights)
    layout = Layout(
        tp=arguments.tensor_parallel_size,
        pp=arguments.pipeline_parallel_size,
        dp=arguments.data_parallel_size,
        spread_experts=arguments.expert_parallel,
    )
    check_layout(layout, shape)
    limits = Limits(
        cache_tokens=cache_tokens(layout, shape, accelerator),
        max_rows=arguments.max_num_seqs,
        max_tokens=arguments.max_num_batched_tokens,
        stages=layout.pp,
        window=shape.window,
    )
    traffic = Traffic(
        num_requests=arguments.num_requests,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        spread=arguments.spread,
        rate=arguments.rate,
        phase=arguments.phase,
        seed=arguments.seed,
    )
    costs: Costs = RooflineCosts(shape, layout, accelerator, arguments.imbalance)
    if arguments.step_costs is not None:
        costs = read_costs(arguments.step_costs)
    outcome = Simulation(costs=costs, limits=limits, traffic=traffic, num_lanes=layout.dp).run()
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[bold]{escape(Path(config.folder).name)}[/] simulated on {layout.num_devices} x {escape(accelerator.name)}: "
        f"tp {layout.tp}, pp {layout.pp}, lanes {layout.dp}, {arguments.weights} weights"
    )
    console.print(
        f"of each device: weights {weight_bytes(layout, shape) / 2**30:.1f} GiB; of each lane: "
        f"{limits.cache_tokens} tokens of cache"
    )
    console.print(_table(outcome, layout.num_devices))
    if arguments.output is not None:
        write(arguments.output, result(outcome, layout.num_devices))
    return 0


def result(outcome: Outcome, num_devices: int) -> dict[str, object]:
    """The figures, for a file."""
    return {
        "simulation": True,
        "devices": num_devices,
        "seconds": outcome.seconds,
        "steps": outcome.num_steps,
        "input_tokens_per_s": outcome.input_tokens / outcome.seconds,
        "output_tokens_per_s": outcome.output_tokens / outcome.seconds,
        "first_token_s": percentiles(outcome.first),
        "between_tokens_s": percentiles(outcome.between),
        "preemptions": outcome.preemptions,
        "busy": outcome.busy,
        "parts_s": outcome.parts,
    }


def _table(outcome: Outcome, num_devices: int) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for what, tokens in (("input", outcome.input_tokens), ("output", outcome.output_tokens)):
        rate = tokens / outcome.seconds
        table.add_row(f"{what} tokens/s", f"{rate:,.0f}", f"{rate / num_devices:,.0f} of each device")
    for what, values, unit, scale in (
        ("to the first token", outcome.first, "s", 1.0),
        ("between tokens", outcome.between, "ms", 1e3),
    ):
        if at := percentiles(values):
            table.add_row(what, f"{scale * at['p50']:.2f} {unit}", f"p99 {scale * at['p99']:.2f} {unit}")
    table.add_row("steps", str(outcome.num_steps), f"{1e3 * outcome.seconds / outcome.num_steps:.2f} ms each")
    table.add_row("busy", f"{outcome.busy:.0%}", "of the time, the first stage")
    computed = sum(outcome.parts.values())
    shares = ", ".join(f"{part} {seconds / computed:.0%}" for part, seconds in outcome.parts.items())
    table.add_row("a step's time", "", shares)
    if outcome.preemptions:
        table.add_row("preemptions", str(outcome.preemptions), "the cache was short")
    return table
