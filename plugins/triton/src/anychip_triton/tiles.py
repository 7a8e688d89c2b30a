"""Tile sizes by target, kernel and problem: shipped tables, and those that `anychip tune` has measured on a machine.

A table is JSON: for each kernel, entries tried in order. An entry fits where every number of the problem is at most
its bound in "up_to"; its other fields are the tile. A measured table names what it was measured with, and is ignored
where that has changed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

_log = logging.getLogger(__name__)

Tile = Mapping[str, int]
"""Block sizes by the kernel's own names, and num_warps and num_stages."""

USER_TABLES = Path("~/.cache/anychip/tiles")


@dataclass(frozen=True, slots=True)
class TileTable:
    """What serves one target."""

    target: str
    entries: Mapping[str, list[dict[str, int | dict[str, int]]]]

    def tile(self, kernel: str, **problem: int) -> Tile:
        """The first entry of a kernel that fits a problem."""
        for entry in self.entries[kernel]:
            bounds = entry.get("up_to", {})
            assert isinstance(bounds, dict)
            if all(problem[name] <= bound for name, bound in bounds.items()):
                return {name: value for name, value in entry.items() if isinstance(value, int)}
        raise LookupError(f"the tile table of {self.target} has no entry of {kernel} for {problem}")


def shipped_table(target: str) -> TileTable:
    """The table that comes with the package."""
    text = files("anychip_triton").joinpath("tables").joinpath(f"{target}.json").read_text()
    return TileTable(target, json.loads(text)["kernels"])


def load_table(target: str, made_with: Mapping[str, str], folder: Path = USER_TABLES) -> TileTable:
    """The shipped table, with what was measured on this machine before it. `made_with` names driver and versions as
    they are now."""
    table = shipped_table(target)
    path = folder.expanduser() / f"{target}.json"
    if not path.exists():
        return table
    try:
        found = json.loads(path.read_text())
        then, measured = found["made_with"], found["kernels"]
    except (ValueError, KeyError, TypeError) as error:
        _log.warning("%s is not a tile table (%s) and is ignored; `anychip tune` writes it anew", path, error)
        return table
    if then != dict(made_with):
        _log.warning(
            "%s was measured with %s, this is %s: it is ignored; `anychip tune` writes it anew",
            path, _shown(then), _shown(made_with),
        )  # fmt: skip
        return table
    return TileTable(target, {name: measured.get(name, []) + entries for name, entries in table.entries.items()})


def _shown(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
