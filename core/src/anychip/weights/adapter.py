"""Reads an adapter's matrices from its folder, and says what keeps them from fitting a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from anychip.adapter_files import AdapterConfig, AdapterFolder, digest_of, read_adapter_config
from anychip.errors import AdapterRefused
from anychip.plugin_api import AdaptedPart, AdapterSite, LowRank
from anychip.weights.files import FileView, SafetensorsFile

_PREFIX = "base_model.model."
"""Of every module's name in PEFT's files: the module that PEFT wraps the model in."""
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_OTHERS = {
    ".lora_magnitude_vector": "a magnitude vector (DoRA)",
    ".lora_embedding_A": "an adapter of an embedding",
    ".lora_embedding_B": "an adapter of an embedding",
    ".lora_A.bias": "a bias in an adapter (lora_bias)",
    ".lora_B.bias": "a bias in an adapter (lora_bias)",
}
"""What a file may hold that is not served, by how its tensors' names end."""


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """`modules` by the checkpoint's names of the matrices that they change."""

    digest: bytes
    modules: Mapping[str, LowRank]


def load_adapter(folder: Path, expected: bytes | None = None) -> LoadedAdapter:
    """All of an adapter, on the host. Raises AdapterRefused for what is not served or not whole, and where the folder's
    digest is not the expected one: its files have changed meanwhile."""
    found = AdapterFolder(folder)
    config, raw = read_adapter_config(found.config)
    file = SafetensorsFile(found.weights)
    try:
        views = {name: file.view(name) for name in file.names()}
        modules = {module: _low_rank(config, module, views) for module in _modules(folder, views)}
        digest = digest_of(raw, file.pieces(0, found.weights.stat().st_size))
    finally:
        file.close()
    if expected is not None and digest != expected:
        raise AdapterRefused(f"{folder} has changed while it was loaded; load the adapter again")
    if not modules:
        raise AdapterRefused(f"{found.weights} holds no matrix of an adapter")
    return LoadedAdapter(digest, modules)


def _modules(folder: Path, names: Iterable[str]) -> list[str]:
    """The modules that the file's tensors belong to. Raises AdapterRefused for a tensor of any other kind."""
    modules: dict[str, None] = {}
    for name in names:
        for ending in (_DOWN, _UP):
            if name.startswith(_PREFIX) and name.endswith(ending):
                modules[name.removeprefix(_PREFIX).removesuffix(ending)] = None
                break
        else:
            kinds = (kind for part, kind in _OTHERS.items() if part in name)
            what = next(kinds, "no matrix A or B of an adapter (a module saved whole, by modules_to_save?)")
            raise AdapterRefused(f"{folder} holds tensor {name!r}, {what}, which is not served")
    return list(modules)


def _low_rank(config: AdapterConfig, module: str, views: Mapping[str, FileView]) -> LowRank:
    pair = [views.get(f"{_PREFIX}{module}{ending}") for ending in (_DOWN, _UP)]
    down, up = pair
    if down is None or up is None:
        missing = "A" if down is None else "B"
        raise AdapterRefused(f"the adapter has no matrix {missing} of {module}; it is not whole")
    rank, scale = config.rank_of(module), config.scale_of(module)
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != rank or up.shape[1] != rank:
        raise AdapterRefused(
            f"{module}: A is {list(down.shape)} and B is {list(up.shape)}; adapter_config.json says rank {rank}, so "
            f"[{rank}, inputs] and [outputs, {rank}] are expected"
        )
    matrices = [view.read() for view in (down, up)]
    for name, matrix in zip("AB", matrices, strict=True):
        if not matrix.is_floating_point() or not bool(torch.isfinite(matrix.float()).all()):
            raise AdapterRefused(f"{module}: matrix {name} holds values that are no finite numbers")
    return LowRank(matrices[0], matrices[1], scale)


def check_fits(adapter: LoadedAdapter, sites: Iterable[AdapterSite], max_rank: int) -> None:
    """Raises AdapterRefused with the first module that no product takes, whose matrices are of another size, or whose
    rank is above the limit."""
    places: dict[str, list[tuple[AdapterSite, AdaptedPart]]] = {}
    for site in sites:
        for part in site.parts:
            places.setdefault(part.module, []).append((site, part))
    for module, matrices in adapter.modules.items():
        if module not in places:
            raise AdapterRefused(_unknown(module, places))
        site, part = places[module][0]
        found, wanted = (matrices.up.shape[0], matrices.down.shape[1]), (part.rows, site.in_features)
        if found != wanted:
            raise AdapterRefused(
                f"{module}: the adapter is for a matrix of {found[0]} rows and {found[1]} columns, the model's has "
                f"{wanted[0]} and {wanted[1]}; it was trained on another base"
            )
        if matrices.rank > max_rank:
            raise AdapterRefused(
                f"{module}: the adapter has rank {matrices.rank}, at most {max_rank} may be; raise --max-adapter-rank"
            )


def _unknown(module: str, places: Iterable[str]) -> str:
    known = sorted({name.rpartition(".")[2] for name in places})
    if not known:
        return f"{module}: none of this model's products take adapters; --model-impl native has them for its families"
    if ".experts." in module:
        return f"{module}: adapters of experts are not served; those of {', '.join(known)} are"
    return f"{module}: the model has no such product that takes an adapter; those that do end in {', '.join(known)}"
