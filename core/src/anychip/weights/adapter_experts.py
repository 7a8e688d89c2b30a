"""Adapters of all experts of a layer at once, as PEFT writes those of stacked parameters, taken apart by expert."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from anychip.errors import AdapterRefused
from anychip.plugin_api import AdapterSite, LowRank
from anychip.weights.adapter import LoadedAdapter
from anychip.weights.checkpoint import Checkpoint

_LAYER = re.compile(r"(.*\blayers\.\d+\.)")
_GATE_UP, _DOWN = ("gate_proj", "up_proj"), ("down_proj",)
_NO_ROOM = "slots have no room for adapters of experts, or the model has none; start with --adapter-targets experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMatrices:
    """One of the two stacks of a layer's experts: the modules that it is made of by expert, one below another, how many
    rows each has, and how many columns they all have."""

    modules: Sequence[Sequence[str]]
    rows: Sequence[int]
    in_features: int

    @property
    def size(self) -> tuple[int, int]:
        """Of one expert's."""
        return sum(self.rows), self.in_features


def stacks_of_sites(sites: Iterable[AdapterSite]) -> list[ExpertMatrices]:
    """Those of a model that is built."""
    return [
        ExpertMatrices(modules=site.experts, rows=[part.rows for part in site.parts], in_features=site.in_features)
        for site in sites
        if site.experts
    ]


def stacks_of_names(adapter: LoadedAdapter, base: Checkpoint) -> list[ExpertMatrices]:
    """Those of a checkpoint that has each expert's matrices by the names of most families."""
    found = []
    for layer in {name.removesuffix(".base_layer") for name in adapter.stacked}:
        count = sum(f"{layer}.{expert}.{_DOWN[0]}.weight" in base.names for expert in range(len(base.names)))
        for parts in (_GATE_UP, _DOWN) if count else ():
            shapes = [base.shape(f"{layer}.0.{part}.weight") for part in parts]
            modules = [[f"{layer}.{expert}.{part}" for part in parts] for expert in range(count)]
            found.append(ExpertMatrices(modules=modules, rows=[shape[0] for shape in shapes], in_features=shapes[0][1]))
    return found


def by_expert(adapter: LoadedAdapter, stacks: Sequence[ExpertMatrices], missing: str = _NO_ROOM) -> LoadedAdapter:
    """The adapter with modules by expert, under the names that the model has. Which of a layer's two stacks is gate and
    up, and which down, its sizes say. Raises AdapterRefused; `missing` is said of a layer without any."""
    modules = dict(adapter.modules)
    for name, matrices in adapter.stacked.items():
        found = (matrices.up.shape[0], matrices.down.shape[1])
        of_layer = [stack for stack in stacks if _layer_of(stack.modules[0][0]) == _layer_of(name)]
        stack = next((each for each in of_layer if each.size == found), None)
        if stack is None:
            sizes = " or ".join(f"{rows} rows and {columns} columns" for rows, columns in (s.size for s in of_layer))
            why = f"they have {sizes}; it was trained on another base" if sizes else missing
            raise AdapterRefused(f"{name}: the adapter is for experts of {found[0]} rows and {found[1]} columns; {why}")
        modules |= _split(name, matrices, stack)
    return replace(adapter, modules=modules, stacked={})


def _layer_of(name: str) -> str:
    match = _LAYER.match(name)
    return match[1] if match else ""


def _split(name: str, matrices: LowRank, stack: ExpertMatrices) -> dict[str, LowRank]:
    """PEFT lays A out as [experts, rank, in_features], and B as [out_features, rank, experts]."""
    count = len(stack.modules)
    if matrices.rank % count:
        raise AdapterRefused(f"{name}: A has {matrices.rank} rows, not as many for each of {count} experts")
    downs = matrices.down.reshape(count, -1, matrices.down.shape[1])
    ups = matrices.up.reshape(len(matrices.up), -1, count)
    found = {}
    for expert, modules in enumerate(stack.modules):
        for module, up in zip(modules, torch.split(ups[:, :, expert], list(stack.rows)), strict=True):
            found[module] = LowRank(downs[expert], up.contiguous(), matrices.scale)
    return found
