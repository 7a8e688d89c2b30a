"""`anychip tune --device cuda`: tries tiles on this machine's device, and keeps those that were fastest.

The table goes where `tiles.load_table` finds it, with the versions that it was measured with. It is written after each
search, and a run goes on where one with the same versions was cut short. Tiles are compiled side by side, those of the
next searches while one is timed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anychip_triton.compilers import Compilers, Device
from anychip_triton.searches import Search, searches
from anychip_triton.tiles import USER_TABLES, MeasuredTable, Tile, TileTable, shipped_table

if TYPE_CHECKING:
    from anychip_triton.platform import TritonPlatform
    from anychip_triton.problems import Problem
    from anychip_triton.targets import Target

Measure = Callable[[str, "Problem", TileTable, int], float]
"""Milliseconds of a kernel in a problem under a table, of so many repeats; infinity where it cannot run there."""

Say = Callable[[str], object]

_FEW, _MANY = 3, 20
"""Repeats of every tile, and of those that are near the best."""

_NEAR, _MOST_NEAR = 1.2, 8
_BETTER = 0.99
"""What is less of a gain over the shipped tile is none."""

_COMPILED_S = 60.0
"""Until another of a search's tiles is compiled: what takes longer counts as not running."""

Compile = Callable[[str, "Sequence[Problem]", Tile], "Future[int]"]
"""Begins to compile a kernel's launches in problems with a tile."""


@dataclass(frozen=True, slots=True)
class AskedTable(TileTable):
    """Keeps what a kernel was given."""

    kernel: str = ""
    given: list[Tile] = field(default_factory=list)

    def tile(self, kernel: str, **problem: int) -> Tile:
        found = TileTable.tile(self, kernel, **problem)
        if kernel == self.kernel and found not in self.given:
            self.given.append(found)
        return found


def tiles_of(search: Search, target: Target) -> tuple[list[Tile], int]:
    """The tiles to try, and how many of them are shipped for the search's problems: these are the first."""
    from anychip_triton.ahead import RecordingLauncher

    table = AskedTable(target.name, shipped_table(target.name).entries, search.kernel)
    for problem in search.problems:
        problem(RecordingLauncher(target, table))
    return [*table.given, *(tile for tile in search.candidates if tile not in table.given)], len(table.given)


@dataclass(frozen=True, slots=True)
class Found:
    """The best tile of a search; `ms` are its times by problem, `shipped_ms` those of the shipped tile."""

    tile: Tile
    ms: list[float]
    shipped_ms: list[float]


def fastest(search: Search, tiles: Sequence[Tile], shipped: int, table: TileTable, measure: Measure) -> Found | None:
    """The tile whose problems need least of what the first tile needs for them, on average; None where none runs. The
    first `shipped` tiles are held unless another is clearly faster."""

    def times(tile: Tile, repeats: int) -> list[float]:
        under, found = table.only(search.kernel, tile), []
        for problem in search.problems:
            found.append(measure(search.kernel, problem, under, repeats))
            if not math.isfinite(found[-1]):
                return [math.inf] * len(search.problems)
        return found

    def share(index: int, all_times: dict[int, list[float]]) -> float:
        base = all_times[0] if math.isfinite(sum(all_times[0])) else [1.0] * len(search.problems)
        return sum(ms / whole for ms, whole in zip(all_times[index], base, strict=True)) / len(base)

    quick = {index: times(tile, _FEW) for index, tile in enumerate(tiles)}
    order = sorted(quick, key=lambda index: share(index, quick))
    if not tiles or not math.isfinite(share(order[0], quick)):
        return None
    near = [index for index in order[:_MOST_NEAR] if share(index, quick) <= _NEAR * share(order[0], quick)]
    kept = [index for index in range(shipped) if math.isfinite(sum(quick[index]))]
    exact = {index: times(tiles[index], _MANY) for index in {0, *kept, *near}}
    best = min(exact, key=lambda index: share(index, exact))
    held = min(kept, key=lambda index: share(index, exact), default=best)
    if share(best, exact) > _BETTER * share(held, exact):
        best = held
    return Found(tiles[best], exact[best], exact[0])


class Prepared:
    """A search's tiles while they are compiled. Without `compile_` they compile when they are timed."""

    def __init__(self, search: Search, target: Target, compile_: Compile | None) -> None:
        self.search = search
        self._tiles, self._shipped = tiles_of(search, target)
        self.now = self._tiles[0] if self._shipped == 1 else None
        """The tile that serves all of the search's problems, where it is one."""
        self._made: list[Future[int]] = []
        if compile_ is not None:
            self._made = [compile_(search.kernel, search.problems, tile) for tile in self._tiles]

    def tiles(self) -> tuple[list[Tile], int, str]:
        """Those that compile, how many of them are shipped, and of the others how many and why, "" where none."""
        if not self._made:
            return self._tiles, self._shipped, ""
        left: set[Future[int]] = set(self._made)
        while left:
            done, left = wait(left, timeout=_COMPILED_S, return_when=FIRST_COMPLETED)
            if not done:
                break
        reasons = [_why_not(future) for future in self._made]
        good = [tile for tile, reason in zip(self._tiles, reasons, strict=True) if not reason]
        bad = [reason for reason in reasons if reason]
        told = f"{len(bad)} tiles do not compile ({bad[0]})" if bad else ""
        return good, sum(not reason for reason in reasons[: self._shipped]), told


def _why_not(made: Future[int]) -> str:
    if not made.done():
        made.cancel()
        return f"not within {_COMPILED_S:.0f} s"
    error = made.exception()
    if error is None or isinstance(error, BrokenProcessPool):  # then this process compiles
        return ""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def tune(
    wanted: Sequence[Search],
    target: Target,
    measure: Measure,
    table: MeasuredTable,
    say: Say,
    *,
    compile_: Compile | None = None,
    seconds: float = math.inf,
) -> None:
    """Searches what the table has not, until the time is over; the table is written after each."""
    until, shipped = time.monotonic() + seconds, shipped_table(target.name)
    left = [search for search in wanted if not table.has(search.kernel, search.up_to)]
    if len(left) < len(wanted):
        say(f"{len(wanted) - len(left)} searches are in {table.path}\n")
    prepared = [Prepared(search, target, compile_) for search in left]
    for each in prepared:
        if each.now is not None:
            table.hold(each.search.kernel, each.search.up_to, each.now)
    for done, each in enumerate(prepared):
        if time.monotonic() >= until:
            say(f"the time is over: {len(left) - done} searches are left\n")
            return
        began, search = time.monotonic(), each.search
        tiles, held, why_not = each.tiles()
        waited_s = time.monotonic() - began
        found = fastest(search, tiles, held, shipped, measure)
        told = {"seconds": time.monotonic() - began, "tiles": len(tiles), "why_not": why_not}
        if found is None:
            table.add(search.kernel, search.up_to, None, **told)
            say(f"{search.name}: none of {len(tiles)} tiles runs; {why_not}\n")
            continue
        table.add(search.kernel, search.up_to, found.tile, ms=found.ms, shipped_ms=found.shipped_ms, **told)
        say(
            f"{search.name}: {_ms(found.ms)} with {dict(found.tile)}, {_ms(found.shipped_ms)} with what is shipped; "
            f"{len(tiles)} tiles in {told['seconds']:.1f} s, of which {waited_s:.1f} s for the compiler. {why_not}\n"
        )


def _ms(times: Sequence[float]) -> str:
    return " + ".join(f"{ms:.4f}" for ms in times) + " ms"


class DeviceMeasure:
    """`Measure` on a platform's device: the problem runs once, then its launches of the kernel again and again."""

    def __init__(self, platform: TritonPlatform, say: Say) -> None:
        self._target = platform.launch.target
        self._place = platform.default_device
        self._say = say

    def __call__(self, kernel: str, problem: Problem, table: TileTable, repeats: int) -> float:
        import torch

        from anychip_triton.timing import KeepingLauncher, device_ms

        keeping = KeepingLauncher(self._target, table, kernel)
        torch.manual_seed(0)  # the same experts are drawn for every tile
        try:
            problem(keeping, self._place)
            torch.cuda.synchronize()
            return device_ms(keeping.again, repeats)
        except Exception as error:  # noqa: BLE001  too much shared memory, or whatever else this tile cannot do here
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
            self._say(f"  {kernel} with {dict(table.entries[kernel][0])} does not run: {reason}\n")
            return math.inf


def open_platform(name: str) -> TritonPlatform:
    """Raises LookupError with the reason and the remedy where the device cannot be used."""
    from anychip.ops.reference import REFERENCE
    from anychip.plugin_api import PlatformContext

    for point in entry_points(group="anychip", name=name):
        for manifest in point.load().anychip_platforms():
            probe = _named(manifest.probe)()
            if not probe.devices:
                raise LookupError(f"{name}: {probe.reason}; {probe.remedy}")
            context = PlatformContext(
                manifest=manifest, device_indexes=(0,), options=manifest.options(), probe=probe, reference=REFERENCE
            )
            platform: TritonPlatform = _named(manifest.platform)(context)
            return platform
    raise LookupError(f"no plugin {name!r} is installed; pip install 'anychip[{name}]'")


def _named(dotted: str) -> Any:
    module, _, name = dotted.partition(":")
    return getattr(import_module(module), name)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", required=True, choices=("cuda", "rocm"), help="whose kernels are tuned")
    parser.add_argument("--folder", type=Path, default=USER_TABLES, help="where the table goes (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="KERNEL[,KERNEL]", help="which kernels (default: all)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no search after so many")
    parser.add_argument("--again", action="store_true", help="search what the table has too")


def chosen(only: str, target: Target) -> list[Search]:
    """Raises ValueError where a kernel has no search."""
    found, named = list(searches(target.shared_bytes)), {name for name in only.split(",") if name}
    kernels = {search.kernel for search in found}
    if named - kernels:
        raise ValueError(f"no search for {', '.join(sorted(named - kernels))}; there are {', '.join(sorted(kernels))}")
    return [search for search in found if not named or search.kernel in named]


def run(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    compilers = _compilers()
    try:
        platform = open_platform(arguments.device)
        target = platform.launch.target
        wanted = chosen(arguments.only, target)
        table = MeasuredTable.open(target.name, platform.made_with(), arguments.folder)
        if arguments.again:
            for search in wanted:
                table.forget(search.kernel, search.up_to)
        compile_ = None if compilers is None else partial(compilers.begin, target.name, _device())
        seconds = 60 * arguments.minutes - (time.monotonic() - began)
        tune(wanted, target, DeviceMeasure(platform, _say), table, _say, compile_=compile_, seconds=seconds)
    except (LookupError, ValueError) as error:
        sys.stderr.write(f"anychip: {error}\n")
        return 2
    finally:
        if compilers is not None:
            compilers.close()
    _say(f"the table is {table.path}; {time.monotonic() - began:.0f} s\n")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _compilers() -> Compilers | None:
    """None where processes cannot be had."""
    try:
        return Compilers()
    except OSError as error:
        _say(f"tiles are compiled one after the other: {error}\n")
        return None


def _device() -> Device:
    from triton.runtime import driver

    found = driver.active.get_current_target()
    return found.backend, found.arch, found.warp_size
