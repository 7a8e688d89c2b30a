"""A product whose parts are stored in several schemes: a kernel for each run of parts that share one.

GGUF's mixed files keep values finer than queries and keys. One scheme that holds them all would take the space of the
finest; two products read each part as it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from anychip.layers.ordered_linear import OrderedLinear
from anychip.plugin_api import ActFormat, LinearKernel, LinearSpec, Platform, QuantScheme


@dataclass(frozen=True, slots=True)
class Stored:
    """How a part's matrix is stored. `ordered`: its columns have an order of their own."""

    scheme: QuantScheme | None
    ordered: bool = False


@dataclass(frozen=True, slots=True)
class _Run:
    """Parts that follow one another in one scheme."""

    kernel: LinearKernel
    rows: slice  # of the product


def linear_of(platform: Platform, spec: LinearSpec, stored: Sequence[Stored]) -> LinearKernel:
    """The kernel of a product whose parts are stored so, in their order."""
    if all(each == stored[0] for each in stored):
        return _kernel(platform, spec, stored[0])
    return MixedLinear(spec, platform, stored)


def _kernel(platform: Platform, spec: LinearSpec, stored: Stored) -> LinearKernel:
    spec = replace(spec, scheme=stored.scheme)
    return OrderedLinear(spec, platform) if stored.ordered else platform.linear(spec)


class MixedLinear(LinearKernel):
    """What is packed is a list: each kernel's own."""

    name = "mixed"

    def __init__(self, spec: LinearSpec, platform: Platform, stored: Sequence[Stored]) -> None:
        super().__init__(spec, platform)
        self._runs: list[_Run] = []
        self._run_of: dict[str, int] = {}
        for held, run in groupby(zip(spec.parts, stored, strict=True), key=lambda each: each[1]):
            parts = [part for part, _ in run]
            start, stop = parts[0].offset, parts[-1].offset + parts[-1].rows
            own = replace(
                spec,
                out_features=stop - start,
                parts=tuple(replace(part, offset=part.offset - start) for part in parts),
            )
            self._run_of |= {part.name: len(self._runs) for part in parts}
            self._runs.append(_Run(_kernel(platform, own, held), slice(start, stop)))
        formats = [run.kernel.accepts for run in self._runs]
        self._accepts = formats[0] if all(each == formats[0] for each in formats) else ActFormat(dtype=spec.dtype)

    def begin(self) -> list[Any]:
        return [run.kernel.begin() for run in self._runs]

    def load(self, packed: list[Any], part: str, tensor: Tensor, *, row: int = 0) -> None:
        at = self._run_of[part.partition(".")[0]]
        self._runs[at].kernel.load(packed[at], part, tensor, row=row)

    def update(self, packed: list[Any], part: str, tensor: Tensor, *, row: int = 0) -> None:
        at = self._run_of[part.partition(".")[0]]
        self._runs[at].kernel.update(packed[at], part, tensor, row=row)

    def finish(self, packed: list[Any]) -> list[Any]:
        return [run.kernel.finish(each) for run, each in zip(self._runs, packed, strict=True)]

    def apply(self, x: Tensor, packed: list[Any], *, out: Tensor | None = None) -> Tensor:
        pieces = [run.kernel.apply(x, each) for run, each in zip(self._runs, packed, strict=True)]
        result = torch.cat(pieces, dim=-1)
        return result if out is None else out.copy_(result)
