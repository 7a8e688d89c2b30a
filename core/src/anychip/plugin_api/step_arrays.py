"""How the arrays of a step are declared: once, beside the fields that hold them.

StepInputs and SamplingInputs give each of their arrays a shape in the step's sizes, a dtype and what padding holds.
Layouts, blank inputs and what core fills in all follow from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import count, takewhile
from math import prod
from typing import Any

import numpy as np

ALIGN = 64
"""Bytes on whose multiples arrays and arenas begin."""

SLOT_DTYPE = "slot_dtype"
"""Stands for the dtype that the device declares for slots of the KV cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Where one array lies in an arena, and what its padded elements hold."""

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    padding: float


Layout = Mapping[str, Section]
"""By array, in the order in which they lie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """A declared array. `shape` and a `padding` that is text name sizes of the step."""

    name: str
    shape: tuple[str, ...]
    dtype: str
    padding: float | str
    feature: str
    """The array is there only in steps with this feature; "": always."""
    by_group: bool
    """One array for each KV group, named NAME_0, NAME_1 and so on."""


def array(
    *shape: str,
    dtype: str = "int32",
    padding: float | str = 0,
    feature: str = "",
    name: str = "",
    by_group: bool = False,
) -> Any:
    """A dataclass field that holds an array; `name` is that of its section where it is not the field's."""
    declared = {"shape": shape, "dtype": dtype, "padding": padding, "feature": feature, "by_group": by_group}
    return field(metadata={"array": declared, "name": name})


@lru_cache
def array_specs(inputs: type) -> Mapping[str, ArraySpec]:
    """The declared arrays of a class, by field."""
    return {
        each.name: ArraySpec(name=each.metadata["name"] or each.name, **each.metadata["array"])
        for each in fields(inputs)
        if "array" in each.metadata
    }


def layout_of(
    inputs: type, sizes: Mapping[str, int], *, features: tuple[str, ...] = (), num_groups: int = 0, slot_dtype: str = ""
) -> Layout:
    """Where the arrays of a class lie in an arena for these sizes and features."""
    placed, offset = dict[str, Section](), 0
    for spec in array_specs(inputs).values():
        if spec.feature and spec.feature not in features:
            continue
        shape = tuple(sizes[name] for name in spec.shape)
        dtype = slot_dtype if spec.dtype == SLOT_DTYPE else spec.dtype
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        padding = sizes[spec.padding] if isinstance(spec.padding, str) else spec.padding
        for name in [f"{spec.name}_{group}" for group in range(num_groups)] if spec.by_group else [spec.name]:
            placed[name] = Section(offset=offset, nbytes=nbytes, shape=shape, dtype=dtype, padding=padding)
            offset += -(-nbytes // ALIGN) * ALIGN
    return placed


def held_arrays(inputs: type, views: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The fields of a class that hold arrays, from an arena's views: None where a feature is off, a tuple where there
    is one for each KV group."""
    held = dict[str, Any]()
    for attribute, spec in array_specs(inputs).items():
        if spec.by_group:
            numbered = (f"{spec.name}_{group}" for group in count())
            held[attribute] = tuple(views[name] for name in takewhile(views.__contains__, numbered))
        else:
            held[attribute] = views.get(spec.name)
    return held
