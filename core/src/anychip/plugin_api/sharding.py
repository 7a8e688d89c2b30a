"""How tensors lie over the ranks of a mesh, and the one place that makes a rank's slices of that.

A tensor is whole on every rank, or some of its dimensions are divided, each along one axis. Specs say so: a weight's
parts in LinearSpec and MoESpec, the KV cache's pages in every PagedSpec.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from anychip.errors import ConfigError
from anychip.plugin_api.mesh import Axis, Mesh, MeshShape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """`count` of something, from `start`."""

    start: int
    count: int

    def times(self, unit: int) -> Span:
        return Span(self.start * unit, self.count * unit)

    def after(self, offset: int) -> Span:
        """The same, with `offset` others before it."""
        return Span(self.start + offset, self.count)

    def within(self, extent: int) -> Span:
        """What of it lies before `extent`."""
        start = min(self.start, extent)
        return Span(start, min(self.start + self.count, extent) - start)

    @property
    def bounds(self) -> tuple[int, int]:
        return self.start, self.start + self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharded:
    """Dimension `dim` is divided along `axis`: the rank at coordinate i holds the i-th of equal shares. `unit` elements
    stay together, such as the rows of one head. `uneven` says what holds where units do not divide: "refuse" them;
    "repeat": of fewer units than ranks, neighbours hold the same one, as KV heads; "pad": shares are rounded up, and
    the last ones reach past the end, as a vocabulary's.
    """

    dim: int
    axis: Axis = "tp"
    unit: int = 1
    uneven: Literal["refuse", "repeat", "pad"] = "refuse"

    def count(self, extent: int, shape: MeshShape, what: str = "elements") -> int:
        """How many of `extent` elements a rank holds. Raises ConfigError where they do not divide."""
        units, size = extent // self.unit, shape.size_of(self.axis)
        if self.uneven == "pad":
            return -(-units // size) * self.unit
        if self.uneven == "repeat" and units < size:
            if size % units:
                raise self._refused(size, units, f"ranks over {what}")
            return self.unit
        if units % size:
            raise self._refused(units, size, what)
        return units // size * self.unit

    def share(self, extent: int, shape: MeshShape, rank: int, what: str = "elements") -> Span:
        """Which elements a rank of the world holds."""
        count, size = self.count(extent, shape, what), shape.size_of(self.axis)
        place = shape.place(self.axis, rank)
        if self.uneven == "repeat" and extent // self.unit < size:
            return Span(place * (extent // self.unit) // size * self.unit, count)
        return Span(place * count, count)

    def _refused(self, units: int, size: int, what: str) -> ConfigError:
        remedy = "tensor_parallel_size" if self.axis == "tp" else f"size of axis {self.axis}"
        return ConfigError(f"{units} {what} do not split evenly {size} ways; choose another {remedy}")


Placed = tuple[Sharded, ...]
"""The divided dimensions of a tensor, each once; of others, every rank holds all."""
REPLICATED: Placed = ()
"""Whole on every rank."""


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A tensor that a built model holds, and how it would lie over the ranks of a mesh."""

    tensor: Tensor
    placed: Placed


KV_HEADS = 2
"""The dimension of heads in a page's canonical form, [2, block_size, num_kv_heads, head_dim]."""


def held(extents: Sequence[int], placed: Placed, mesh: Mesh, what: str = "elements") -> tuple[Span, ...]:
    """By dimension, what a mesh's rank holds of a tensor. Raises ConfigError where a dimension does not divide."""
    spans = [Span(0, extent) for extent in extents]
    for sharded in placed:
        spans[sharded.dim] = sharded.share(extents[sharded.dim], mesh.shape, mesh.rank, what)
    return tuple(spans)
