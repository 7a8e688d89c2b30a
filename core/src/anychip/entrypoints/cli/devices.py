"""`anychip devices`: what is installed, what is here, and why the rest is not."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anychip.environment import Environment
from anychip.registry.devices import Candidate, candidates
from anychip.registry.plugins import BrokenPlugin, load_plugins


def add_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(arguments: argparse.Namespace) -> int:
    plugins = load_plugins()
    found = candidates(plugins)
    if arguments.json:
        document = {
            "devices": [as_json(option) for option in found],
            "broken": [{"package": broken.package, "error": str(broken.error)} for broken in plugins.broken],
        }
        print(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())
    else:
        _print_table(found, plugins.broken)
    return 0


def as_json(option: Candidate) -> dict[str, Any]:
    manifest = option.manifest
    return {
        "name": manifest.name,
        "package": manifest.package,
        "summary": manifest.summary,
        "usable": not option.problems,
        "problems": option.problems,
        "remedy": option.remedy,
        "auto": manifest.auto_select,
        "seam": manifest.seam,
        "api_version": manifest.api_version,
        "options": {f.name: f.metadata.get("help", "") for f in fields(manifest.options)},
        "devices": [
            {"index": d.index, "name": d.name, "total_memory": d.total_memory, "detail": d.detail}
            for d in option.probe.devices
        ],
    }


def _print_table(found: list[Candidate], broken: list[BrokenPlugin]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("device", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("what", overflow="fold")
    for option in found:
        manifest, problems = option.manifest, option.problems
        state = "[red]cannot run[/]" if problems else "[green]ready[/]"
        if not problems and not manifest.auto_select:
            state = "[green]by name[/]"
        lines = [f"{manifest.package}: {escape(manifest.summary)}"]
        lines += [escape(problem) for problem in problems] or [_hardware(option)]
        if option.remedy:
            lines.append(f"[dim]remedy: {escape(option.remedy)}[/]")
        for setting in fields(manifest.options):
            lines.append(f"[dim]--device-opt {setting.name}: {escape(setting.metadata.get('help', ''))}[/]")
        table.add_row(f"[bold]{manifest.name}[/]", state, "\n".join(lines))
    for plugin in broken:
        table.add_row("-", "[red]broken[/]", f"{plugin.package}: {escape(str(plugin.error))}")
    Console().print(table)


def _hardware(option: Candidate) -> str:
    devices = option.probe.devices
    first = devices[0]
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    return escape(f"{count}{first.name}" + (f" ({first.detail})" if first.detail else ""))
