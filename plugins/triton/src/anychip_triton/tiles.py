"""Tile sizes by target, kernel and problem: shipped tables, and those that `anychip tune` has measured on a machine.

A table is JSON: for each kernel, entries tried in order. An entry fits where every number of the problem is at most
its bound in "up_to"; its other fields are the tile. A measured table names what it was measured with, and is ignored
where that has changed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

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

    def only(self, kernel: str, tile: Tile) -> TileTable:
        """The same table, with one tile for all of a kernel's problems."""
        return TileTable(self.target, {**self.entries, kernel: [dict(tile)]})


@dataclass(slots=True)
class MeasuredTable:
    """A table as it is measured, written after each search: what a run that is cut short has found is kept, and what
    was searched with the same versions is not searched again."""

    path: Path
    made_with: Mapping[str, str]
    entries: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    searched: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, target: str, made_with: Mapping[str, str], folder: Path = USER_TABLES) -> MeasuredTable:
        """What is there, where it was made with the same; else an empty one, which replaces it."""
        path = folder.expanduser() / f"{target}.json"
        table = cls(path, dict(made_with))
        try:
            found = json.loads(path.read_text())
            if found["made_with"] == table.made_with:
                table.entries, table.searched = dict(found["kernels"]), list(found["searched"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return table

    def has(self, kernel: str, up_to: Mapping[str, int]) -> bool:
        return any(done["kernel"] == kernel and done["up_to"] == dict(up_to) for done in self.searched)

    def forget(self, kernel: str, up_to: Mapping[str, int]) -> None:
        """A search is done anew; until then its entry stays."""
        self.searched = [done for done in self.searched if (done["kernel"], done["up_to"]) != (kernel, dict(up_to))]

    def hold(self, kernel: str, up_to: Mapping[str, int], tile: Tile) -> None:
        """An entry for what is not searched yet, unless there is one: a wider search's tile is not for it."""
        if all(entry["up_to"] != dict(up_to) for entry in self.entries.get(kernel, [])):
            self._put(kernel, up_to, tile)

    def add(self, kernel: str, up_to: Mapping[str, int], tile: Tile | None, **told: Any) -> None:
        """A search's result, on disk when this returns; None where no tile ran. `told` is kept beside it."""
        self.searched.append({"kernel": kernel, "up_to": dict(up_to), **told})
        if tile is not None:
            self._put(kernel, up_to, tile)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = {"made_with": dict(self.made_with), "kernels": self.entries, "searched": self.searched}
        beside = self.path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(text, indent=1) + "\n")
        beside.replace(self.path)

    def _put(self, kernel: str, up_to: Mapping[str, int], tile: Tile) -> None:
        others = [entry for entry in self.entries.get(kernel, []) if entry["up_to"] != dict(up_to)]
        self.entries[kernel] = sorted([*others, {"up_to": dict(up_to), **tile}], key=_width)


def _width(entry: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Sorts an entry before all whose bounds hold its own: the wider has fewer bounds, or the same ones, of which one
    is larger and none smaller."""
    bounds = entry["up_to"]
    return -len(bounds), tuple(bounds.values())


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
