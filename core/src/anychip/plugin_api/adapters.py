"""Low-rank adapters (LoRA) beside matrix products: where they go, how they lie on the device, what a step has of them.

The adapter of a product y = x W^T adds scale * (x A^T) B^T, with A [rank, in_features] and B [out_features, rank]
(Hu et al., arXiv 2106.09685). A device holds `max_adapters` of them at once, each in a slot, for every product that
takes adapters. Which slot a token has is an array of the step (feature ADAPTERS). Storage never moves, so graphs that
are captured over it stay valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each part begins in the product, and where the last one ends."""
        return (*(part.offset for part in self.parts), self.out_features)

    def nbytes(self, max_adapters: int, max_rank: int) -> int:
        """What the site's stack takes on this rank."""
        width = len(self.parts) * self.columns.count + self.out_features
        item = 4 if self.dtype == "float32" else 2
        return max_adapters * (max_rank * width * item + 8 * len(self.parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStack:
    """The adapters of one site, by slot. What lies beyond an adapter's own rank is zero, and so is an empty slot."""

    down: Tensor  # [max_adapters, num_parts, max_rank, in_features]
    up: Tensor  # [max_adapters, max_rank, out_features], a part's columns where they stand in the product
    scales: Tensor  # [max_adapters, num_parts] float32
    ranks: Tensor  # [max_adapters, num_parts] int32; 0: the adapter leaves the part as it is
    offsets: tuple[int, ...]  # AdapterSite.offsets

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """For programs whose compiled steps take tensors alone."""
        return self.down, self.up, self.scales, self.ranks


@dataclass(frozen=True, slots=True)
class LowRank:
    """One module's adapter, whole: `down` [rank, in_features], `up` [out_features, rank], on the host."""

    down: Tensor
    up: Tensor
    scale: float

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


def sites_of(model: Any) -> Sequence[AdapterSite]:
    """A StepModel's; () where its family takes no adapters."""
    sites: Sequence[AdapterSite] = getattr(model, "adapter_sites", ())
    return sites
