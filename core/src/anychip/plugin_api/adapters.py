"""Low-rank adapters (LoRA) beside matrix products: where they go, how they lie on the device, what a step has of them.

The adapter of a product y = x W^T adds scale * (x A^T) B^T, with A [rank, in_features] and B [out_features, rank]
(Hu et al., arXiv 2106.09685). DoRA (Liu et al., arXiv 2402.09353) multiplies each row of W + scale * B A by a gain. An
embedding is the product of a token's one-hot vector. A device holds `max_adapters` of them at once, each in a slot, for
every product that takes adapters. Which slot a token has is an array of the step (feature ADAPTERS). Storage never
moves, so graphs that are captured over it stay valid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from anychip.plugin_api.sharding import Span
from anychip.types import DType

if TYPE_CHECKING:
    from torch import Tensor

NO_ADAPTER = -1
"""The slot of a token without an adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedPart:
    """The rows of a product that come from one module of the checkpoint. The module has `rows` rows, of which this rank
    holds `held`; they stand at `offset` in the product."""

    module: str
    rows: int
    held: Span
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSite:
    """A product that takes adapters, on this rank. Of the modules' `in_features` columns this rank holds `columns`;
    `index` counts the model's sites from 0."""

    index: int
    in_features: int
    columns: Span
    out_features: int
    """Rows of the product on this rank."""
    parts: tuple[AdaptedPart, ...]
    dtype: DType
    kind: Literal["product", "embedding"] = "product"
    """An embedding's in_features are tokens."""
    experts: tuple[tuple[str, ...], ...] = ()
    """Of a product that every expert has: the modules of its parts, by expert of this rank. A slot has a place for each
    expert then. `parts` are the first one's."""
    gains: bool = False
    """Whether slots have room for DoRA's gains."""
    biased: bool = False
    """Whether the product adds a bias on this rank."""

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each part begins in the product, and where the last one ends."""
        return (*(part.offset for part in self.parts), self.out_features)

    @property
    def modules(self) -> tuple[tuple[str, ...], ...]:
        """The modules of the parts, by place of a slot."""
        return self.experts or (tuple(part.module for part in self.parts),)

    def shapes(self, max_adapters: int, max_rank: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Of the tensors of the site's stack, by their names there: shape and dtype."""
        places, parts = max_adapters * len(self.modules), len(self.parts)
        embeds = self.kind == "embedding"
        width = max_rank if embeds else self.columns.count
        found: dict[str, tuple[tuple[int, ...], str]] = {
            "down": ((places, parts, max_rank, width), self.dtype),
            "up": ((places, max_rank, self.out_features), self.dtype),
            "scales": ((places, parts), "float32"),
            "ranks": ((places, parts), "int32"),
        }
        if embeds:
            found["table"] = ((places * self.in_features, max_rank), self.dtype)
        if self.gains:
            found["gains"] = ((places + 1, self.out_features), "float32")
        if self.gains and self.biased:
            found["shifts"] = ((places + 1, self.out_features), "float32")
        return found

    def nbytes(self, max_adapters: int, max_rank: int) -> int:
        """What the site's stack takes on this rank."""
        shapes = self.shapes(max_adapters, max_rank).values()
        return sum(math.prod(shape) * (4 if dtype in ("float32", "int32") else 2) for shape, dtype in shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStack:
    """The adapters of one site, by place: a slot, or slot * experts + expert. What lies beyond an adapter's own rank is
    zero, and so is an empty place."""

    down: Tensor  # [places, num_parts, max_rank, in_features]
    up: Tensor  # [places, max_rank, out_features], a part's columns where they stand in the product
    scales: Tensor  # [places, num_parts] float32
    ranks: Tensor  # [places, num_parts] int32; 0: the adapter leaves the part as it is
    offsets: tuple[int, ...]  # AdapterSite.offsets
    table: Tensor | None = None  # [places * num_tokens, max_rank]: A of an embedding by token; `down` is the identity
    gains: Tensor | None = None  # [places + 1, out_features] float32; the last row is of ones
    shifts: Tensor | None = None  # [places + 1, out_features] float32: what keeps gains off the bias; the last is zero

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """For programs whose compiled steps take tensors alone."""
        held = (self.down, self.up, self.scales, self.ranks, self.table, self.gains, self.shifts)
        return tuple(tensor for tensor in held if tensor is not None)

    @classmethod
    def of(cls, site: AdapterSite, tensors: Sequence[Tensor]) -> AdapterStack:
        """From its `tensors`."""
        names = site.shapes(1, 1)
        return cls(offsets=site.offsets, **dict(zip(names, tensors, strict=True)))


@dataclass(frozen=True, slots=True)
class LowRank:
    """One module's adapter, whole: `down` [rank, in_features], `up` [out_features, rank], on the host."""

    down: Tensor
    up: Tensor
    scale: float
    gain: Tensor | None = None  # [out_features] float32, DoRA's
    shift: Tensor | None = None  # [out_features] float32: (1 - gain) * bias

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """What a slot holds from now on, by module, in place of what it held: StepProgram.adapt takes it."""

    slot: int
    modules: Mapping[str, LowRank]


@dataclass(frozen=True, slots=True)
class StepAdapters:
    """A step's adapters, given to the model in ForwardContext: what Ops.add_low_rank takes behind each product."""

    slots: Tensor  # [num_tokens] int32; NO_ADAPTER: none
    stacks: Sequence[AdapterStack]  # by AdapterSite.index

    def at(self, rows: Tensor) -> StepAdapters:
        """Of some of the step's tokens."""
        return StepAdapters(self.slots[rows], self.stacks)


def sites_of(model: Any) -> Sequence[AdapterSite]:
    """A StepModel's; () where its family takes no adapters."""
    sites: Sequence[AdapterSite] = getattr(model, "adapter_sites", ())
    return sites


def takes_head_adapters(model: Any) -> bool:
    """Whether StepModel.logits takes the step's adapters too: logits(hidden, adapters)."""
    return bool(getattr(model, "adapts_head", False))
