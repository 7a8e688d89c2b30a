"""What the first hour on a GPU is for: what fails there, and how fast each kernel and each step is.

python benchmarks/gpu/first_hour.py FOLDER [--parts limits steps kernels conformance tune] [--minutes 9]

Every result is a line of FOLDER/results.jsonl as soon as it is there. What FOLDER has is not measured again: a run that
was cut short is continued by the same command. `--minutes` begins no measurement after so many.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import workloads
from compare import engine_command, figure

from anychip.bench.report import machine

PARTS = ("limits", "steps", "kernels", "conformance", "tune")
_ENGINE_S = 240
"""Until an engine and all its workloads are given up."""


class Results:
    """The lines of a file, and how much time is left. Lines are told apart by part and name."""

    def __init__(self, folder: Path, minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._path = folder / "results.jsonl"
        self._until = time.monotonic() + 60 * minutes
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self._found = {(line["part"], line["name"]): line for line in map(json.loads, lines)}

    @property
    def seconds_left(self) -> float:
        return self._until - time.monotonic()

    def get(self, part: str, name: str) -> dict[str, Any] | None:
        return self._found.get((part, name))

    def add(self, part: str, name: str, values: dict[str, Any]) -> None:
        line = {"part": part, "name": name, **values}
        self._found[part, name] = line
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        short = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
        print(f"{part:12} {name:44} {short}", flush=True)

    def measure(self, part: str, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Unless it is there or the time is over. A failure is a result too."""
        if self.get(part, name) is not None or self.seconds_left <= 0:
            return
        try:
            values = work()
        except Exception as error:  # noqa: BLE001  what fails on this device is what the hour is to find out
            values = {"error": f"{type(error).__name__}: {error}"[:2000]}
        self.add(part, name, values)


def limits(results: Results, arguments: argparse.Namespace) -> None:
    @cache
    def told() -> dict[str, Any]:
        command = [sys.executable, str(Path(__file__).with_name("limits.py"))]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    results.measure("limits", "machine", lambda: machine() | told()["device"])
    results.measure("limits", "device", lambda: told()["limits"])


def kernels(results: Results, arguments: argparse.Namespace) -> None:
    from kernels import compile_all, measured, timed

    from anychip_triton.tune import open_platform

    limits(results, arguments)
    found = results.get("limits", "device") or {}
    platform = open_platform(arguments.device)
    launch, place = platform.launch, platform.default_device

    def compiled() -> dict[str, Any]:
        began = time.perf_counter()
        compile_all(launch, place)
        return {"seconds": time.perf_counter() - began}

    results.measure("kernels", "compiled", compiled)
    for case in measured():
        results.measure("kernels", case.name, lambda case=case: timed(case, launch, place, found))


def steps(results: Results, arguments: argparse.Namespace) -> None:
    for shape in arguments.shapes:
        vocab = workloads.SHAPES[shape]["vocab_size"]
        wanted = [name for name in ("start", *arguments.workloads) if results.get("steps", f"{shape} {name}") is None]
        if not wanted or results.seconds_left <= 0:
            continue
        log = results.folder / f"engine-{shape}.log"
        try:
            for result in _engine(shape, wanted, arguments, log, min(_ENGINE_S, results.seconds_left)):
                value, unit = figure(result, vocab, arguments.scale)
                results.add("steps", f"{shape} {result['workload']}", {"value": value, "unit": unit, **result})
        except RuntimeError as error:
            print(f"steps        {shape}: {error}; {log} has its log", flush=True)


def _engine(
    shape: str, wanted: list[str], arguments: argparse.Namespace, log: Path, seconds: float
) -> Iterator[dict[str, Any]]:
    """What engine.py prints, as it comes. Raises RuntimeError where it ends otherwise than well."""
    with tempfile.TemporaryDirectory() as folder, log.open("w") as said:
        named = [name for name in wanted if name != "start"]
        command = engine_command("anychip", sys.executable, shape, folder, named, arguments)
        engine = subprocess.Popen(
            ["timeout", str(int(seconds)), *command], stdout=subprocess.PIPE, stderr=said, text=True
        )
        assert engine.stdout is not None
        yield from map(json.loads, engine.stdout)
        if engine.wait():
            raise RuntimeError(f"the engine ended with status {engine.returncode}")


def conformance(results: Results, arguments: argparse.Namespace) -> None:
    def judged() -> dict[str, Any]:
        began = time.perf_counter()
        command = [sys.executable, "-m", "anychip.entrypoints.cli.main", "conformance", "--device", arguments.device]
        command += ["--profile", arguments.profile, "-n", str(arguments.workers)]
        command += ["--report", str(results.folder / "conformance")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1, results.seconds_left))
        (results.folder / "conformance.log").write_text(done.stdout + done.stderr)
        last = done.stdout.strip().splitlines()[-1:]
        return {"status": done.returncode, "seconds": time.perf_counter() - began, "said": "".join(last)}

    results.measure("conformance", arguments.profile, judged)


def tune(results: Results, arguments: argparse.Namespace) -> None:
    def tuned() -> dict[str, Any]:
        command = [sys.executable, "-m", "anychip.entrypoints.cli.main", "tune", "--device", arguments.device]
        command += ["--folder", str(results.folder / "tiles"), "--minutes", str(results.seconds_left / 60 - 1)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1, results.seconds_left))
        return {"status": done.returncode, "said": done.stdout.splitlines()}

    results.measure("tune", "all", tuned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    shapes = [name for name in workloads.SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", default=shapes, choices=workloads.SHAPES)
    parser.add_argument("--workloads", nargs="+", default=workloads.WORKLOADS, choices=workloads.WORKLOADS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--device-opt", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--profile", default="full", choices=("quick", "core", "full"), help="of conformance")
    parser.add_argument("--workers", type=int, default=8, help="of conformance: judged processes side by side")
    parser.add_argument("--minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    results = Results(arguments.folder, arguments.minutes)
    for part in arguments.parts:
        globals()[part](results, arguments)


if __name__ == "__main__":
    main()
