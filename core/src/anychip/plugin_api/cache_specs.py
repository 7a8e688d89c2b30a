"""The kinds of cache that a layer may have, as a closed union: what core plans, sizes and hands out follows from these.

Who matches on CacheSpec ends with assert_never: a kind that comes to be is found by the type checker in every place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from anychip.plugin_api.attention import AttentionBackend, AttentionSpec
from anychip.plugin_api.cache import CanonicalArray, stored_dtype
from anychip.plugin_api.encoder import EncoderSpec
from anychip.plugin_api.latent import LatentBackend, LatentSpec
from anychip.plugin_api.sharding import REPLICATED, Placed
from anychip.plugin_api.state import StateSpec
from anychip.types import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSpec:
    """A row per token beside another layer's cache: the keys by which sparse attention chooses tokens. It is an entry
    of its own among a model's specs."""

    dim: int
    dtype: DType
    kv_dtype: DType
    window: int | None = None
    pages: ClassVar[Placed] = REPLICATED

    def canonical(self, block_size: int) -> tuple[CanonicalArray, ...]:
        return (CanonicalArray("index", (block_size, self.dim), stored_dtype(self.kv_dtype)),)


PagedSpec = AttentionSpec | LatentSpec | IndexSpec
"""What is kept by token, in blocks of the tokens' pool."""
PagedBackend = AttentionBackend | LatentBackend
"""What serves a PagedSpec: it is planned by block size, and sees a step as a BatchView."""
CacheSpec = PagedSpec | StateSpec | EncoderSpec
