"""`anychip merge-adapter`: writes a checkpoint that has an adapter in its weights."""

from __future__ import annotations

import argparse
from importlib import import_module

from anychip.environment import Environment
from anychip.hub import resolve_folder

MERGE = "anychip.weights.merge"
"""Loaded by name: it needs torch, which other commands do not."""


def add_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    parser.add_argument("model", help="checkpoint folder or hub repository of the base")
    parser.add_argument("adapter", help="the adapter's folder, in PEFT's form")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the merged checkpoint goes")


def run(arguments: argparse.Namespace) -> int:
    folder = str(resolve_folder(arguments.model))
    count = import_module(MERGE).merge_adapter(folder, arguments.adapter, arguments.output)
    print(f"{count} matrices changed: {arguments.output}")
    return 0
