"""`anychip doctor`: every installed plugin, chosen or why not and what to do. Writes nothing."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.markup import escape

import anychip
from anychip.config import EngineConfig
from anychip.environment import Environment
from anychip.errors import PluginError, UserError
from anychip.launch.inspect import OpReport, inspect_ops
from anychip.plugin_api.version import API_VERSION
from anychip.registry.devices import Candidate, ChosenDevice, candidates, choose_device
from anychip.registry.plugins import Plugins, load_plugins


def add_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    parser.add_argument("--device", default=environment.device, help="auto, NAME or NAME:INDEX")
    parser.add_argument("--hot-path", action="store_true", help="list what serves each op")


def run(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    plugins = load_plugins()
    console.print(
        f"anychip {anychip.__version__}, interface {API_VERSION}, torch {installed('torch')}, "
        f"Python {platform.python_version()} on {sys.platform}"
    )
    chosen, problem = _choose(arguments.device, plugins)
    for option in candidates(plugins):
        _print_plugin(console, option, chosen)
    for broken in plugins.broken:
        console.print(f"\n[red]✗[/] [bold]{escape(broken.package)}[/]: {escape(str(broken.error))}")
    if problem is not None:
        console.print(f"\n[red]{escape(problem)}[/]")
        return 2
    assert chosen is not None
    if arguments.hot_path:
        _print_ops(console, inspect_ops(chosen))
    return 0


def _choose(device: str, plugins: Plugins) -> tuple[ChosenDevice | None, str | None]:
    try:
        return choose_device(EngineConfig(device=device), plugins), None
    except (UserError, PluginError) as error:
        return None, str(error)


def _print_plugin(console: Console, option: Candidate, chosen: ChosenDevice | None) -> None:
    manifest, problems = option.manifest, option.problems
    is_chosen = chosen is not None and chosen.manifest is manifest
    mark = "[green]✓[/]" if is_chosen else "[red]✗[/]" if problems else "[dim]-[/]"
    console.print(
        f"\n{mark} [bold]{manifest.name}[/] ({manifest.package} {installed(manifest.package)}, "
        f"interface {manifest.api_version}, {manifest.seam} seam): {escape(manifest.summary)}"
    )
    if is_chosen and chosen is not None:
        console.print(f"    chosen: {escape(chosen.reason)}")
    elif problems:
        for problem in problems:
            console.print(f"    not chosen: {escape(problem)}")
        if option.remedy:
            console.print(f"    remedy: {escape(option.remedy)}")
    else:
        why = "another device comes first" if manifest.auto_select else "only by name, with --device"
        console.print(f"    not chosen: {why}")
    for requirement in option.requirements:
        tick = (
            "[green]ok[/]"
            if requirement.met
            else "[yellow]absent[/]"
            if requirement.requirement.optional
            else "[red]unmet[/]"
        )
        console.print(f"    {tick} {escape(requirement.describe())}")
    for name, value in option.probe.versions.items():
        console.print(f"    {escape(name)} {escape(value)}")


def _print_ops(console: Console, report: OpReport) -> None:
    console.print(f"\nops on {escape(report.platform)}:")
    for name, source in report.served_by.items():
        console.print(f"    {name}: {escape(source)}")
    for note in report.notes:
        console.print(f"    [yellow]note[/] {escape(note)}")
    console.print(f"{len(report.reference_ops)} of {len(report.served_by)} ops run as reference")


def installed(package: str) -> str:
    """A package's version, or a word for its absence."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
