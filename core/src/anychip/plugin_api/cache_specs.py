"""The kinds of cache that a layer may have, as a closed union: what core plans, sizes and hands out follows from these.

Who matches on CacheSpec ends with assert_never: a kind that comes to be is found by the type checker in every place.
"""

from __future__ import annotations

from anychip.plugin_api.attention import AttentionBackend, AttentionSpec
from anychip.plugin_api.encoder import EncoderSpec
from anychip.plugin_api.latent import LatentBackend, LatentSpec
from anychip.plugin_api.state import StateSpec

PagedSpec = AttentionSpec | LatentSpec
"""What is kept by token, in blocks of the tokens' pool."""
PagedBackend = AttentionBackend | LatentBackend
"""What serves a PagedSpec: it is planned by block size, and sees a step as a BatchView."""
CacheSpec = PagedSpec | StateSpec | EncoderSpec
