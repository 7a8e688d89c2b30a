"""What every layer's cache has in common, whatever it holds: a canonical form, and storage that a backend lays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Protocol

from anychip.errors import Unsupported
from anychip.types import DType, itemsize

if TYPE_CHECKING:
    from torch import Tensor

Cache = Any
"""A backend's storage for one layer: opaque to core."""


@dataclass(frozen=True, slots=True)
class CanonicalArray:
    """One array of a block, in the form in which blocks cross between layouts, devices and stores. Row-major."""

    name: str
    shape: tuple[int, ...]
    """Of one block."""
    dtype: DType | Literal["uint8"]
    """uint8: values of one byte, which the cache's dtype says how to read."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * (1 if self.dtype == "uint8" else itemsize(self.dtype))


class HasCanonicalForm(Protocol):
    def canonical(self, block_size: int) -> tuple[CanonicalArray, ...]:
        """The arrays of one block of `block_size` tokens, or of one sequence's state. Names are unique."""
        ...


def stored_dtype(dtype: DType) -> DType | Literal["uint8"]:
    """The dtype of a canonical array whose cache has this one."""
    return "uint8" if itemsize(dtype) == 1 else dtype


def plain_bytes(spec: HasCanonicalForm, block_size: int) -> int:
    """Bytes of one block in the plain layout: its canonical arrays, nothing else. For a state, of one sequence."""
    return sum(array.nbytes for array in spec.canonical(block_size))


class CacheBackend:
    """Moves blocks of a cache that it laid out. A subclass writes copy_blocks, zero_blocks, export_arrays and
    import_arrays, and what its kind of cache asks for."""

    name = "unnamed"

    def copy_blocks(self, cache: Cache, src: Sequence[int], dst: Sequence[int]) -> Cache:
        """Block dst[i] becomes a copy of block src[i] as it was before the call: a block may stand in both lists, and
        several times in src; of those that dst names several times, the last copy counts. Either may be empty."""
        raise Unsupported(self.name, ["copy_blocks is not implemented"])

    def zero_blocks(self, cache: Cache, ids: Sequence[int]) -> Cache:
        """Fills blocks with zeros. An id may stand twice."""
        raise Unsupported(self.name, ["zero_blocks is not implemented"])

    def export_arrays(self, cache: Cache, ids: Sequence[int]) -> dict[str, Tensor]:
        """Blocks in canonical form, in the order of `ids`: the spec's arrays by name, each [len(ids), *shape]. They
        are copies: the pool goes on without changing them. An id may stand twice; of no ids come empty arrays."""
        raise Unsupported(self.name, ["export_arrays is not implemented"])

    def import_arrays(self, cache: Cache, ids: Sequence[int], arrays: Mapping[str, Tensor]) -> Cache:
        """The inverse of export_arrays, of ids that differ; other blocks stay. The arrays are the caller's again."""
        raise Unsupported(self.name, ["import_arrays is not implemented"])
