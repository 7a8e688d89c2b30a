"""`anychip plan`: weights, activations, graphs, KV cache, context and concurrency, before anything is loaded."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anychip.entrypoints.cli.options import add_engine_options, engine_config
from anychip.entrypoints.cli.serve import size
from anychip.environment import Environment
from anychip.launch.plan import EnginePlan, plan_engine
from anychip.worker_report import MemoryPlan


def add_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    add_engine_options(parser, environment)


def run(arguments: argparse.Namespace) -> int:
    config = engine_config(arguments)
    show(config.public_name, plan_engine(config))
    return 0


def show(name: str, plan: EnginePlan) -> None:
    each = "" if plan.num_devices == 1 else f", each of {plan.num_devices} devices"
    if len(plan.stages) > 1:
        each = f", {len(plan.stages)} stages of {plan.num_devices // len(plan.stages)} of {plan.num_devices} devices"
    if plan.num_lanes > 1:
        each = f", {plan.num_lanes} lanes of {plan.num_devices // plan.num_lanes} of {plan.num_devices} devices"
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[bold]{escape(name)}[/] on {plan.worker.device}{each} "
        f"({plan.model.architecture}, {plan.model.num_layers} layers, quantization {plan.quantization})"
    )
    console.print(f"serves {plan.served.task}: {escape(plan.served.why)}")
    told = set[str]()
    for stage, worker in enumerate(plan.stages, start=1):
        if len(plan.stages) > 1:
            console.print(f"\neach device of stage {stage}:")
        table = _memory_table(worker.memory, plan.total)
        if worker is plan.worker:
            table.add_row("context", str(plan.max_model_len), f"of the model's {plan.model.max_positions}")
            if plan.longest != sys.maxsize:
                table.add_row("  that fits", str(plan.longest), "of one request, in the KV cache")
            at_once = f"requests of {plan.max_model_len} tokens at once" + ", in each lane" * (plan.num_lanes > 1)
            table.add_row("concurrency", f"{worker.memory.max_concurrency:.1f}", at_once)
        console.print(table)
        for note in worker.notes:
            if note not in told:
                console.print(f"  note: {escape(note)}")
        told.update(worker.notes)


def _memory_table(memory: MemoryPlan, total: int | None) -> Table:
    """What one device holds; `total` bytes are its memory, where that is known."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("weights", size(memory.weights))
    table.add_row("activations", size(memory.activations), "of the largest step")
    table.add_row("graphs", size(memory.graphs))
    states = f", {memory.num_states - 1} states" if memory.num_states else ""
    held = f"{memory.num_blocks - 1} blocks, {memory.kv_tokens} tokens{states}"
    table.add_row("KV cache", size(memory.kv_cache), held)
    for what, nbytes in (
        ("keys and values", memory.kv_token),
        ("latent rows", memory.latent_token),
    ):
        if nbytes:
            table.add_row("  of a token", f"{nbytes} B", f"{what}, in all layers")
    if memory.state_sequence:
        table.add_row("  of a sequence", f"{memory.state_sequence} B", "states, in all layers, whatever its length")
    together = memory.weights + memory.activations + memory.graphs + memory.kv_cache
    table.add_row("together", size(together), "" if total is None else f"of {size(total)}")
    return table
