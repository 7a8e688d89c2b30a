"""What layers are built with, and the register in which each says which checkpoint tensors it wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from anychip.errors import ConfigError
from anychip.plugin_api import Ops, Platform, Shard, WeightView
from anychip.types import DType


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """One checkpoint tensor that a layer wants: its whole shape, and the function that reads this rank's share."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[WeightView], None]


@dataclass(slots=True)
class WeightRegister:
    """Filled while layers are built, emptied by the loader."""

    slots: dict[str, WeightSlot] = field(default_factory=dict)
    finishers: list[Callable[[], None]] = field(default_factory=list)
    ignored: tuple[str, ...] = ()
    """Endings of tensor names that a checkpoint may hold and the model does not use."""

    def want(self, name: str, shape: tuple[int, ...], load: Callable[[WeightView], None]) -> None:
        assert name not in self.slots, f"two layers want {name}"
        self.slots[name] = WeightSlot(name, shape, load)


@dataclass(frozen=True, slots=True, kw_only=True)
class Builder:
    """Handed down while a model is built."""

    platform: Platform
    ops: Ops
    shard: Shard
    dtype: DType
    weights: WeightRegister

    def split(self, total: int, what: str) -> Span:
        """This rank's equal share of `total`."""
        if total % self.shard.size:
            raise _uneven(total, self.shard.size, what)
        rows = total // self.shard.size
        return Span(self.shard.rank * rows, rows)

    def split_heads(self, num_kv_heads: int) -> Span:
        """This rank's KV heads; with more ranks than heads, neighbours hold the same head."""
        size, rank = self.shard.size, self.shard.rank
        if num_kv_heads >= size:
            return self.split(num_kv_heads, "key-value heads")
        if size % num_kv_heads:
            raise _uneven(size, num_kv_heads, "ranks over key-value heads")
        return Span(rank * num_kv_heads // size, 1)


@dataclass(frozen=True, slots=True)
class Span:
    """`count` of something, from `start`."""

    start: int
    count: int

    def times(self, unit: int) -> Span:
        return Span(self.start * unit, self.count * unit)

    @property
    def bounds(self) -> tuple[int, int]:
        return self.start, self.start + self.count


def _uneven(total: int, size: int, what: str) -> ConfigError:
    return ConfigError(f"{total} {what} do not split evenly {size} ways; choose another tensor_parallel_size")
