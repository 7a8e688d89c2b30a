"""Memory as a platform reports it and as it gives it to kernels. All sizes in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryInfo:
    """None where the runtime does not say; then Platform.kv_budget answers for the KV cache."""

    free: int | None
    total: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """The most that a call held beyond what was held before it; `exact` False for an estimate."""

    nbytes: int
    exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsKey:
    """Whose weights: `name` tells a model's shard, in the form asked for, from others; `contents` changes with the
    checkpoint's files."""

    name: str
    contents: str


class DeviceMemory(Protocol):
    """Where a kernel's weights come from: of its platform, a kernel needs no more."""

    def empty(self, shape: Sequence[int], dtype: str, tag: str) -> Tensor:
        """An uninitialised tensor on the device; `tag` as in Platform.allocate."""
        ...
