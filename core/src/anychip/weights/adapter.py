"""Reads an adapter's matrices from its folder, and says what keeps them from fitting a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from anychip.adapter_files import AdapterConfig, AdapterFolder, digest_of, read_adapter_config, targets_of
from anychip.errors import AdapterRefused
from anychip.plugin_api import AdaptedPart, AdapterSite, LowRank
from anychip.weights.files import FileView, SafetensorsFile

_PREFIX = "base_model.model."
"""Of every module's name in PEFT's files: the module that PEFT wraps the model in."""
_MATRICES = (".lora_A.weight", ".lora_B.weight")
_OF_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
"""PEFT writes the first; files that were written in its early form have the second."""
_BASE = ".base_layer.weight"
STACKED = (".experts", ".experts.base_layer")
"""How the names end that PEFT gives the two stacks of a layer's experts (target_parameters)."""
_OTHERS = {
    ".lora_magnitude_vector": "a magnitude vector of another form (DoRA)",
    ".lora_A.bias": "a bias in an adapter (lora_bias)",
    ".lora_B.bias": "a bias in an adapter (lora_bias)",
}
"""What a file may hold that is not served, by a part of its tensors' names."""


class BaseWeights(Protocol):
    """The checkpoint under an adapter, by its names."""

    @property
    def names(self) -> frozenset[str]: ...
    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """`modules` by the checkpoint's names of the matrices that they change. Of `embeddings`, A is [rank, num_tokens].
    `magnitudes` are DoRA's, by module; `base` are the weights that PEFT has saved beside the adapter, by name.
    `stacked` are those of all experts of a layer at once, [experts * rank, in_features] and [out_features, rank *
    experts], by what PEFT calls them."""

    digest: bytes
    modules: Mapping[str, LowRank]
    embeddings: frozenset[str] = frozenset()
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    base: Mapping[str, Tensor] = field(default_factory=dict)
    stacked: Mapping[str, LowRank] = field(default_factory=dict)


def load_adapter(folder: Path, expected: bytes | None = None) -> LoadedAdapter:
    """All of an adapter, on the host. Raises AdapterRefused for what is not served or not whole, and where the folder's
    digest is not the expected one: its files have changed meanwhile."""
    found = AdapterFolder(folder)
    config, raw = read_adapter_config(found.config)
    file = SafetensorsFile(found.weights)
    try:
        views = {name: file.view(name) for name in file.names()}
        _check_known(folder, views)
        pairs = dict.fromkeys(_modules(views, _MATRICES), _MATRICES)
        pairs |= (embeddings := dict.fromkeys(_modules(views, _OF_EMBEDDING), _OF_EMBEDDING))
        modules = {module: _low_rank(config, module, views, endings) for module, endings in pairs.items()}
        stacked = {module: modules.pop(module) for module in list(modules) if module.endswith(STACKED)}
        magnitudes = {
            module: _finite(views[f"{_PREFIX}{module}{ending}"], f"{module}: its magnitude")
            for ending in _MAGNITUDES
            for module in _modules(views, (ending,))
        }
        base = {f"{module}.weight": views[f"{_PREFIX}{module}{_BASE}"].read() for module in _modules(views, (_BASE,))}
        digest = digest_of(raw, file.pieces(0, found.weights.stat().st_size))
    finally:
        file.close()
    if expected is not None and digest != expected:
        raise AdapterRefused(f"{folder} has changed while it was loaded; load the adapter again")
    if not modules and not stacked:
        raise AdapterRefused(f"{found.weights} holds no matrix of an adapter")
    if bool(raw.get("use_dora")) != bool(magnitudes):
        raise AdapterRefused(f"{found.config} has use_dora {raw.get('use_dora')}, {found.weights.name} says otherwise")
    return LoadedAdapter(digest, modules, frozenset(embeddings), magnitudes, base, stacked)


def _check_known(folder: Path, names: Iterable[str]) -> None:
    """Raises AdapterRefused for a tensor of another kind than those that are read."""
    for name in names:
        if not (name.startswith(_PREFIX) and name.endswith((*_MATRICES, *_OF_EMBEDDING, *_MAGNITUDES, _BASE))):
            kinds = (kind for part, kind in _OTHERS.items() if part in name)
            what = next(kinds, "no matrix A or B of an adapter (a module saved whole, by modules_to_save?)")
            raise AdapterRefused(f"{folder} holds tensor {name!r}, {what}, which is not served")


def _modules(names: Iterable[str], endings: tuple[str, ...]) -> list[str]:
    """The modules whose tensors end so."""
    return list(
        {
            name.removeprefix(_PREFIX).removesuffix(ending): None
            for name in names
            for ending in endings
            if name.endswith(ending)
        }
    )


def _low_rank(config: AdapterConfig, module: str, views: Mapping[str, FileView], endings: tuple[str, str]) -> LowRank:
    down, up = (views.get(f"{_PREFIX}{module}{ending}") for ending in endings)
    if down is None or up is None:
        missing = "A" if down is None else "B"
        raise AdapterRefused(f"the adapter has no matrix {missing} of {module}; it is not whole")
    rank, scale = config.rank_of(module), config.scale_of(module)
    count = down.shape[0] // rank if module.endswith(STACKED) and down.shape else 1
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != rank * count or up.shape[1] != rank * count:
        raise AdapterRefused(
            f"{module}: A is {list(down.shape)} and B is {list(up.shape)}; adapter_config.json says rank {rank}, so "
            f"[{rank}, inputs] and [outputs, {rank}] are expected"
        )
    matrices = [_finite(view, f"{module}: matrix {name}") for name, view in zip("AB", (down, up), strict=True)]
    return LowRank(matrices[0], matrices[1], scale)


def _finite(view: FileView, what: str) -> Tensor:
    held = view.read()
    if not held.is_floating_point() or not bool(torch.isfinite(held.float()).all()):
        raise AdapterRefused(f"{what} holds values that are no finite numbers")
    return held


def check_fits(adapter: LoadedAdapter, sites: Iterable[AdapterSite], max_rank: int) -> None:
    """Raises AdapterRefused with the first module that no product takes, whose matrices are of another size, or whose
    rank is above the limit."""
    places: dict[str, tuple[AdapterSite, AdaptedPart]] = {}
    for site in sites:
        for names in site.modules:
            for part, name in zip(site.parts, names, strict=True):
                places.setdefault(name, (site, part))
    for module, matrices in adapter.modules.items():
        embeds = module in adapter.embeddings
        if module not in places or embeds != (places[module][0].kind == "embedding"):
            raise AdapterRefused(_unknown(module, places, embeds))
        site, part = places[module]
        found, wanted = (matrices.up.shape[0], matrices.down.shape[1]), (part.rows, site.in_features)
        if found != wanted:
            found, wanted = (found[::-1], wanted[::-1]) if embeds else (found, wanted)
            raise AdapterRefused(
                f"{module}: the adapter is for a matrix of {found[0]} rows and {found[1]} columns, the model's has "
                f"{wanted[0]} and {wanted[1]}; it was trained on another base"
            )
        if matrices.rank > max_rank:
            raise AdapterRefused(
                f"{module}: the adapter has rank {matrices.rank}, at most {max_rank} may be; raise --max-adapter-rank"
            )
        if module in adapter.magnitudes and not site.gains:
            raise AdapterRefused(
                f"{module}: slots have no room for DoRA's magnitudes of it; start with --adapter-targets magnitudes "
                "where it is given without. Quantized matrices, embeddings and experts never have it: serve plain "
                "weights, or put the adapter into them (anychip merge-adapter)"
            )


def _unknown(module: str, places: Iterable[str], embeds: bool) -> str:
    known = sorted({name.rpartition(".")[2] for name in places})
    if not known:
        return f"{module}: none of this model's products take adapters; --model-impl native has them for its families"
    form = ".lora_embedding_A" if embeds else ".lora_A.weight"
    (target,) = targets_of([f".{module}{form}"]) or ("products",)
    if target == "products":
        return f"{module}: the model has no such product that takes an adapter; those that do end in {', '.join(known)}"
    return (
        f"{module}: slots have no room for adapters of {target}, or the model has no such module; start with "
        f"--adapter-targets {target}. Those that take adapters end in {', '.join(known)}"
    )
