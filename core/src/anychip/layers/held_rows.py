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
from anychip.weights.register import Take


@dataclass(frozen=True, slots=True)
class Stretch:
    """`rows` rows of a tensor, placed over the ranks as `placed` says."""

    rows: int
    placed: Placed = REPLICATED


class HeldRows:
    """`rows` [rows of this rank, *the tensor's other dimensions]: of each stretch this rank's share, one behind the
    other. Several names: each stretch is a tensor by itself. `made` changes the values as they are read."""

    placed_tensors = MappingProxyType({"rows": (Sharded(dim=0),)})

    def __init__(
        self,
        builder: Builder,
        name: str | Sequence[str],
        stretches: Sequence[Stretch],
        *,
        inner: tuple[int, ...] = (),
        dtype: DType | None = None,
        made: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        tensors = (
            [(name, stretches)] if isinstance(name, str) else zip(name, ([each] for each in stretches), strict=True)
        )
        held = [(tensor, parts, held_stretches(builder, tensor, parts)) for tensor, parts in tensors]
        count = sum(span.count for _, _, spans in held for span in spans)
        self.rows = builder.platform.empty((count, *inner), dtype or builder.dtype, "weights")
        at = 0
        for tensor, parts, spans in held:
            total = sum(stretch.rows for stretch in parts)
            builder.weights.want(tensor, (total, *inner), self._take(spans, at, made))
            at += sum(span.count for span in spans)

    def _take(self, spans: Sequence[Span], first: int, made: Callable[[Tensor], Tensor]) -> Take:
        def take(view: WeightView) -> None:
            at = first
            for span in spans:
                self.rows[at : at + span.count].copy_(made(view.read(span.bounds).float()))
                at += span.count

        return take


def held_stretches(builder: Builder, name: str, stretches: Sequence[Stretch]) -> list[Span]:
    """This rank's rows of each stretch, counted from the tensor's first row."""
    spans, first = [], 0
    for stretch in stretches:
        (span,) = builder.held((stretch.rows,), stretch.placed, f"rows of {name}")
        spans.append(span.after(first))
        first += stretch.rows
    return spans
