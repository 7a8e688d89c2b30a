"""`anychip new-plugin NAME`: a package of the same form as ours, over the reference ops on the host."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from anychip_conformance.new_plugin import write_plugin


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="the device's name, as in --device NAME: lower case letters and digits")
    parser.add_argument("--seam", choices=["torch", "step"], default="torch", help="torch: core calls your kernels; "
                        "step: you run whole compiled steps (default: torch)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="where anychip-NAME is made")


def run(arguments: argparse.Namespace) -> int:
    folder = write_plugin(arguments.name, arguments.seam, arguments.output)
    sys.stdout.write(
        f"{folder} is a complete plugin. Next:\n\n"
        f"  pip install -e {folder}\n"
        f"  anychip conformance --device {arguments.name}\n"
        f'  anychip generate --device {arguments.name} --prompt "import numpy as"\n'
    )
    return 0
