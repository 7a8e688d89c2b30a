"""Small tensors that lie over the ranks by rows, cut from stretches of a checkpoint's tensor: what a state layer knows
of its channels or heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from anychip.layers.build import Builder
from anychip.plugin_api import REPLICATED, Placed, Sharded, Span, WeightView
from anychip.types import DType


@dataclass(frozen=True, slots=True)
class Stretch:
    """`rows` rows of a tensor, placed over the ranks as `placed` says."""

    rows: int
    placed: Placed = REPLICATED


class HeldRows:
    """`rows` [rows of this rank, *the tensor's other dimensions]: of each stretch this rank's share, one behind the
    other. `made` changes the values as they are read."""

    placed_tensors = MappingProxyType({"rows": (Sharded(dim=0),)})

    def __init__(
        self,
        builder: Builder,
        name: str,
        stretches: Sequence[Stretch],
        *,
        inner: tuple[int, ...] = (),
        dtype: DType | None = None,
        made: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        spans = held_stretches(builder, name, stretches)
        total = sum(stretch.rows for stretch in stretches)
        self.rows = builder.platform.empty(
            (sum(span.count for span in spans), *inner), dtype or builder.dtype, "weights"
        )

        def take(view: WeightView) -> None:
            at = 0
            for span in spans:
                self.rows[at : at + span.count].copy_(made(view.read(span.bounds).float()))
                at += span.count

        builder.weights.want(name, (total, *inner), take)


def held_stretches(builder: Builder, name: str, stretches: Sequence[Stretch]) -> list[Span]:
    """This rank's rows of each stretch, counted from the tensor's first row."""
    spans, first = [], 0
    for stretch in stretches:
        (span,) = builder.held((stretch.rows,), stretch.placed, f"rows of {name}")
        spans.append(span.after(first))
        first += stretch.rows
    return spans
