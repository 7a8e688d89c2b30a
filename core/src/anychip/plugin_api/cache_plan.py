"""The layout that core gives the cache: which layers form a group, and where their blocks lie."""

from __future__ import annotations

from dataclasses import dataclass

from anychip.plugin_api.cache_specs import PagedSpec
from anychip.plugin_api.encoder import EncoderSpec
from anychip.plugin_api.state import StateSpec


@dataclass(slots=True, kw_only=True)
class KVPlan:
    """Groups are numbered: first those whose layers keep something by token, then one for each spec of state layers,
    then one for each spec of encoder layers, which keep nothing.

    Groups of tokens share a pool of `num_buffers` buffers. State layers have a pool of their own, in which every layer
    has a buffer and a sequence has one block, the same in all of them.
    """

    block_sizes: tuple[int, ...]  # by group of tokens
    layer_groups: tuple[int, ...]  # by layer
    layer_buffers: tuple[int, ...]  # by layer: the buffer in its pool
    num_buffers: int
    """Buffers of the tokens' pool: the most layers that a group has."""
    page_bytes: int
    """Bytes of one block in one buffer."""
    specs: tuple[PagedSpec, ...]  # by group of tokens
    states: tuple[StateSpec, ...] = ()
    """By group of states."""
    state_bytes: int = 0
    """Bytes of one sequence's block in all state layers."""
    encoders: tuple[EncoderSpec, ...] = ()
    """By group of encoder layers."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of tokens in all buffers."""
        return self.page_bytes * self.num_buffers
