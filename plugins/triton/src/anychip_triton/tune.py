"""`anychip tune --device cuda`: tries tiles on this machine's device, and writes those that were fastest.

The table goes where `tiles.load_table` finds it, with the versions that it was measured with.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from itertools import product as combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anychip_triton.tiles import USER_TABLES, Tile, TileTable, shipped_table

if TYPE_CHECKING:
    from anychip_triton.platform import TritonPlatform
    from anychip_triton.problems import Problem

Measure = Callable[[str, "Problem", TileTable], float]
"""Milliseconds of a kernel in a problem under a table; infinity where it cannot run there."""


@dataclass(frozen=True, slots=True)
class Search:
    """One entry of a table: the problems that it is for, and the tiles to try."""

    kernel: str
    up_to: Mapping[str, int]
    problems: Sequence[Problem]
    candidates: Sequence[Tile]


def searches() -> Iterator[Search]:
    """What is worth a search, the narrower bounds of a kernel first."""
    from anychip_triton.problems import FP8, INT4, attention, experts, product

    llama: dict[str, Any] = {"heads": 32, "kv_heads": 8, "dim": 128}
    decode = [partial(attention, **llama, rows=rows, queries=1, context=2048) for rows in (1, 128)]
    prompts = [partial(attention, **llama, rows=4, queries=2048, context=2048)]
    plain = {"dim": 128, "item": 2, "narrow": 0}
    yield Search("attention", {"many_tokens": 0, **plain}, decode, _tiles((16,), (16, 32, 64, 128)))
    yield Search("attention", plain, prompts, _tiles((64, 128), (32, 64, 128)))
    shapes = ({"columns": 4096, "features": 6144}, {"columns": 14336, "features": 4096})
    for rows, quantized in combinations((16, 64, 4096), (True, False)):
        if quantized:
            problems = [partial(product, rows=rows, scheme=s, **shape) for shape in shapes for s in (INT4, FP8)]
        elif rows == 16:
            problems = [partial(product, rows=count, **shape) for shape in shapes for count in (1, 16)]
        else:
            continue  # the vendor's library does these
        heights = {16: (16,), 64: (32, 64), 4096: (64, 128)}[rows]
        bounds = {"rows": rows, "item": 2} | ({"bits": 8} if quantized else {})
        yield Search("matmul", bounds, problems, _tiles(heights, (16, 32, 64, 128), (64, 128, 256)))
    for tokens in (128, 4096):
        heights = (16, 32) if tokens == 128 else (64, 128)
        tiles = _tiles(heights, (32, 64, 128), (32, 64, 128))
        bounds = {"pairs": 8 * tokens, "item": 2, "quantized": 0}
        yield Search("expert_matmul", bounds, [partial(experts, tokens=tokens)], tiles)


def _tiles(rows: Sequence[int], columns: Sequence[int], depths: Sequence[int] = (0,)) -> list[Tile]:
    found = []
    for m, n, k, warps, stages in combinations(rows, columns, depths, (4, 8), (1, 2, 3, 4)):
        depth = {"block_k": k} if k else {}
        found.append({"block_m": m, "block_n": n, **depth, "num_warps": warps, "num_stages": stages})
    return found


def tuned(
    target: str, wanted: Sequence[Search], measure: Measure, say: Callable[[str], object]
) -> dict[str, list[Any]]:
    """Entries by kernel. A search in which nothing ran has none: the shipped tile stays."""
    shipped = shipped_table(target)
    entries: dict[str, list[Any]] = {}
    for search in wanted:
        tables = [_with(shipped, search.kernel, tile) for tile in search.candidates]
        before, *times = (
            sum(measure(search.kernel, problem, table) for problem in search.problems) for table in (shipped, *tables)
        )
        where, best = f"{search.kernel} {dict(search.up_to)}", min(times)
        if not math.isfinite(best):
            say(f"{where}: none of {len(times)} tiles runs\n")
            continue
        tile = search.candidates[times.index(best)]
        entries.setdefault(search.kernel, []).append({"up_to": dict(search.up_to), **tile})
        say(f"{where}: {best:.3f} ms with {dict(tile)}; {before:.3f} ms with what is shipped\n")
    return entries


def _with(table: TileTable, kernel: str, tile: Tile) -> TileTable:
    return TileTable(table.target, {**table.entries, kernel: [dict(tile)]})


class DeviceMeasure:
    """`Measure` on a platform's device: the problem runs once, then its launches of the kernel again and again."""

    def __init__(self, platform: TritonPlatform) -> None:
        self._target = platform.launch.target
        self._place = platform.default_device

    def __call__(self, kernel: str, problem: Problem, table: TileTable) -> float:
        import torch
        from triton.runtime.errors import OutOfResources

        from anychip_triton.timing import KeepingLauncher, device_ms

        keeping = KeepingLauncher(self._target, table, kernel)
        try:
            problem(keeping, self._place)
            torch.cuda.synchronize()
            return device_ms(keeping.again)
        except (OutOfResources, RuntimeError):  # too much shared memory, or a tile that the compiler cannot do
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


def run(arguments: argparse.Namespace) -> int:
    try:
        platform = open_platform(arguments.device)
    except LookupError as error:
        sys.stderr.write(f"anychip: {error}\n")
        return 2
    target = platform.launch.target.name
    entries = tuned(target, list(searches()), DeviceMeasure(platform), sys.stdout.write)
    folder = arguments.folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{target}.json"
    path.write_text(json.dumps({"made_with": dict(platform.made_with()), "kernels": entries}, indent=1) + "\n")
    sys.stdout.write(f"written to {path}\n")
    return 0
