"""What tensors an object holds, whatever layouts its kernels chose, and whether they fit."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, UntypedStorage, nn

from anychip.errors import ConfigError
from anychip.plugin_api import REPLICATED, HeldTensor, Placed, Platform

_OPAQUE = frozenset({"torch", "numpy", "rich", "msgspec", *sys.stdlib_module_names})
"""Packages whose objects are not looked into: layers, kernels, plugins and modelling code are."""


def held_bytes(root: object) -> int:
    """The sum over storages that tensors reachable from `root` lie in, each counted once."""
    return sum(storage.nbytes() for storage in held_storages(root))


def held_storages(root: object) -> list[UntypedStorage]:
    """Each once, in an order that is the same for objects built alike."""
    storages: dict[int, UntypedStorage] = {}
    for held in held_tensors(root):
        storage = held.tensor.untyped_storage()
        storages[storage._cdata] = storage
    return list(storages.values())


def held_tensors(root: object) -> list[HeldTensor]:
    """Each once. A layer says in `placed_tensors`, by attribute, how its own lie; of others, every rank holds all."""
    tensors: list[Tensor] = []
    places: dict[int, Placed] = {}
    seen: set[int] = set()
    waiting: list[object] = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            tensors.append(item)
            continue
        known: Mapping[str, Placed] = getattr(item, "placed_tensors", {})
        places |= {id(getattr(item, name)): placed for name, placed in known.items()}
        waiting.extend(_parts(item))
    return [HeldTensor(tensor, places.get(id(tensor), REPLICATED)) for tensor in tensors]


def _parts(item: object) -> Iterator[Any]:
    if isinstance(item, Mapping):
        yield from item.values()
    elif isinstance(item, list | tuple):
        yield from item
    elif isinstance(item, nn.Module):
        yield from item.parameters(recurse=False)
        yield from item.buffers(recurse=False)
        yield from item.children()
        yield from vars(item).values()
    elif not isinstance(item, type) and type(item).__module__.split(".")[0] not in _OPAQUE:
        yield from getattr(item, "__dict__", {}).values()
        for kind in type(item).__mro__:
            for slot in getattr(kind, "__slots__", ()):
                yield getattr(item, slot, None)


def check_weights_fit(platform: Platform, nbytes: int, free: int | None) -> None:
    """Raises ConfigError when weights of so many bytes do not fit into a device's free memory, where that is known."""
    if free is not None and nbytes > free:
        raise ConfigError(
            f"the weights take {nbytes / 2**30:.1f} GiB on each of {platform.name}'s devices and "
            f"{free / 2**30:.1f} GiB are free: {(nbytes - free) / 2**30:.1f} GiB are missing; use more devices with "
            "--tensor-parallel-size, or --quantization int4"
        )
