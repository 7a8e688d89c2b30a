"""`anychip conformance --device NAME`: the suite, run by pytest in a process of its own."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from anychip_conformance.pytest_plugin import PROFILE_CHOICES

_PASSED_ON = ("device", "profile", "params", "seed", "report", "waivers", "deadline_scale")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", required=True, help="the platform to judge; `anychip devices` lists them")
    parser.add_argument(
        "--device-opt", action="append", default=[], metavar="KEY=VALUE", help="an option of its plugin"
    )
    parser.add_argument(
        "--profile", choices=PROFILE_CHOICES, default="core",
        help="quick: a part of Core, a minute; core: what every device must pass; full: every profile (default: core)",
    )  # fmt: skip
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="ID",
        help="a case, a kind, or a section of the profile",
    )
    parser.add_argument("--params", metavar="JSON", help="with --case: these parameters instead of its own")
    parser.add_argument("--seed", type=int, help="draw tier B from this seed instead of the fixed one")
    parser.add_argument("--report", metavar="DIR", help="write scorecard.json and scorecard.md there")
    parser.add_argument(
        "--waivers", metavar="FILE", help="TOML with known failures; a waiver never makes a device conform"
    )
    parser.add_argument("--deadline-scale", type=float, metavar="X", help="multiplies every deadline")
    parser.add_argument("-n", dest="workers", metavar="N", help="judged processes side by side, or auto (pytest-xdist)")


def run(arguments: argparse.Namespace) -> int:
    """The exit status: 0 where every case passed or is not supported, and something passed."""
    # Whatever else of pytest's is installed or configured has no say in a verdict, and takes seconds to load.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.call([sys.executable, "-m", "pytest", *pytest_arguments(arguments)], env=environment)


def pytest_arguments(arguments: argparse.Namespace) -> list[str]:
    command = ["--pyargs", "anychip_conformance.cases", "-q", "--no-header", "-r", "N", "-p", "no:cacheprovider"]
    command += ["--tb", "short", "--import-mode", "importlib", "-p", "anychip_conformance.pytest_plugin"]
    command += ["-c", os.devnull, "--rootdir", os.curdir]
    for name in _PASSED_ON:
        value = getattr(arguments, name)
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    for option in arguments.device_opt:
        command += ["--device-opt", option]
    for case in arguments.case:
        command += ["--case", case]
    return command + (["-p", "xdist.plugin", "-n", arguments.workers] if arguments.workers else [])
