"""The caches of a model's layers in the torch seam: makes them, moves their blocks, and plans a step over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from anychip.plugin_api import (
    CacheBackend,
    EncoderBackend,
    KVPlan,
    PagedBackend,
    Platform,
    Recorder,
    StateBackend,
    StepInputs,
)
from anychip.plugin_api.step_layout import batch_view, encoder_view, state_view


class LayerCaches:
    """`backends` by layer, told apart by what they keep. The caches themselves are the program's state."""

    def __init__(self, platform: Platform, backends: Sequence[CacheBackend], kv: KVPlan) -> None:
        self._platform = platform
        self._kv = kv
        states = {layer: backend for layer, backend in enumerate(backends) if isinstance(backend, StateBackend)}
        self._states: dict[int, StateBackend] = states  # by layer, as the next
        encoders = {layer: backend for layer, backend in enumerate(backends) if isinstance(backend, EncoderBackend)}
        self._encoders: dict[int, EncoderBackend] = encoders
        self._paged = {
            layer: cast(PagedBackend, backend)
            for layer, backend in enumerate(backends)
            if layer not in states and layer not in encoders
        }
        num_groups = len(kv.specs) + len(kv.states) + len(kv.encoders)
        self._first_layer: list[int | None] = [None] * num_groups  # None: another stage has all of the group's layers
        for layer, group in reversed(list(enumerate(kv.layer_groups))):
            self._first_layer[group] = layer

    def make(self, num_blocks: int, num_states: int) -> list[object]:
        """By layer."""
        kv, allocate = self._kv, self._platform.allocate
        buffers = [allocate(num_blocks * kv.page_bytes, "kv") for _ in range(kv.num_buffers)]
        caches: list[object] = [None] * len(kv.layer_groups)
        for layer, backend in self._paged.items():
            size = kv.block_sizes[kv.layer_groups[layer]]
            caches[layer] = backend.make_cache(buffers[kv.layer_buffers[layer]], num_blocks, size)
        for layer, states in self._states.items():
            caches[layer] = states.make_cache(allocate(num_states * states.state_bytes(), "kv"), num_states)
        return caches

    def edit(self, caches: list[object], copies: Sequence[tuple[int, int]], zeros: Sequence[int]) -> None:
        """StepProgram.edit, in place."""
        for layer, backend in self._paged.items():
            cache = caches[layer]
            # In order: a copy's destination may be a later copy's source, and its source a block to zero.
            for source, destination in copies:
                cache = backend.copy_blocks(cache, [source], [destination])
            if zeros:
                cache = backend.zero_blocks(cache, zeros)
            caches[layer] = cache

    def copy_states(self, caches: list[object], copies: Sequence[tuple[int, int]]) -> None:
        """StepProgram.copy_states, in place."""
        for layer, backend in self._states.items():
            for source, destination in copies:  # in order: a destination may be a later source
                caches[layer] = backend.copy_blocks(caches[layer], [source], [destination])

    def plans(
        self,
        inputs: StepInputs,
        fields: Mapping[str, Tensor],
        *,
        into: Sequence[object] | None = None,
        recorder: Recorder | None = None,
    ) -> list[object]:
        """By group: those of tokens, then those of states, then those of encoders; None for a group without a layer
        here."""
        host_lengths = self._platform.capabilities.host_lengths
        plans: list[object] = []
        for group, size in enumerate(self._kv.block_sizes):
            first = self._first_layer[group]
            if first is None:
                plans.append(None)
                continue
            batch = batch_view(inputs, fields, group=group, block_size=size, host_lengths=host_lengths)
            backend = self._paged[first]
            plan = into[group] if into is not None else None
            plans.append(backend.plan(batch, inputs.key, group=group, into=plan, recorder=recorder))
        for group in range(len(plans), len(plans) + len(self._kv.states)):
            first = self._first_layer[group]
            if first is None:
                plans.append(None)
                continue
            states, plan = self._states[first], into[group] if into is not None else None
            view = state_view(inputs, fields)
            plans.append(states.plan(view, inputs.key, group=group, into=plan, recorder=recorder))
        for group in range(len(plans), len(self._first_layer)):
            first = self._first_layer[group]
            assert first is not None, "a model of encoder layers is whole"
            encoder, plan = self._encoders[first], into[group] if into is not None else None
            rows = encoder_view(inputs, fields)
            plans.append(encoder.plan(rows, inputs.key, group=group, into=plan, recorder=recorder))
        return plans
