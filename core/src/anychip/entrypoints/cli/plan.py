"""`anychip plan`: weights, activations, graphs, KV cache, context and concurrency, before anything is loaded."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anychip.config import Environment
from anychip.entrypoints.cli.options import add_engine_options, engine_config
from anychip.entrypoints.cli.serve import size
from anychip.launch.plan import EnginePlan, plan_engine


def add_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    add_engine_options(parser, environment)


def run(arguments: argparse.Namespace) -> int:
    config = engine_config(arguments)
    show(config.public_name, plan_engine(config))
    return 0


def show(name: str, plan: EnginePlan) -> None:
    memory = plan.worker.memory
    each = "" if plan.num_devices == 1 else f", each of {plan.num_devices} devices"
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[bold]{escape(name)}[/] on {plan.worker.device}{each} "
        f"({plan.model.architecture}, {plan.model.num_layers} layers, quantization {plan.quantization})"
    )
    console.print(f"serves {plan.served.task}: {escape(plan.served.why)}")
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
    total = memory.weights + memory.activations + memory.graphs + memory.kv_cache
    table.add_row("together", size(total), "" if plan.total is None else f"of {size(plan.total)}")
    table.add_row("context", str(plan.max_model_len), f"of the model's {plan.model.max_positions}")
    table.add_row("concurrency", f"{memory.max_concurrency:.1f}", f"requests of {plan.max_model_len} tokens at once")
    console.print(table)
    for note in plan.worker.notes:
        console.print(f"  note: {escape(note)}")
