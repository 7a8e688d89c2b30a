"""Lays out the cache: groups layers by what they keep, picks block sizes whose pages match, gives states their pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from anychip.errors import ConfigError, Unsupported
from anychip.layers.context_parallel import contexts_of
from anychip.plugin_api import (
    CacheBackend,
    CacheSpec,
    EncoderSpec,
    KVPlan,
    PagedBackend,
    PagedSpec,
    StateBackend,
    StateSpec,
    StepProgram,
)
from anychip.plugin_api.refusals import among
from anychip.types import cdiv
from anychip.worker_report import CacheGroup, KVCacheConfig, KVGroup, StateGroup

_GROUP_COST = 15 / 900
"""What one more group costs: its tables, slot mappings and plans take about 15 microseconds of a step of 256 rows, of
the 900 that a step takes on the host. KV memory that lies unused costs throughput by the same share."""
_TYPICAL_TOKENS = 4096
"""Of the request whose unused memory is counted: a layer without a window holds all of them, others their window."""


BackendFor = Callable[[CacheSpec], CacheBackend]


def plan_kv(
    specs: Sequence[CacheSpec],
    backend_for: BackendFor,
    block_size: int | None,
    *,
    stages: Sequence[range] | None = None,
    own: int = 0,
) -> KVPlan:
    """`specs` by layer. With `stages` of a pipeline, which say by stage which of them are its own, the plan is of the
    layers of stage `own`, counted from its first. Groups are the same on all stages, since a request's blocks are; one
    may have no layer of a stage.

    Layers of one spec that keep something by token form groups of at most `num_buffers` layers; a
    group's n-th layer lies in the pool's n-th buffer, so a block id means the same bytes in every group and belongs to
    one at a time. State layers have a buffer each, in a pool of their own. Encoder layers
    keep nothing, and have groups for their plans alone.

    Raises ConfigError for a block size that the backend lacks, Unsupported for layers whose pages cannot match, and
    for a model that mixes encoder layers with others.
    """
    by_spec: dict[PagedSpec, list[int]] = {}
    states: dict[StateSpec, list[int]] = {}
    encoders: dict[EncoderSpec, list[int]] = {}
    stages = [range(len(specs))] if stages is None else stages
    held = stages[own]
    for layer, spec in enumerate(specs):
        match spec:
            case EncoderSpec():
                backend_for(spec)  # refuses it, where the device lacks it
                encoders.setdefault(spec, []).append(layer)
            case StateSpec():
                states.setdefault(spec, []).append(layer)
            case _:
                by_spec.setdefault(spec, []).append(layer)
    if not specs:
        raise Unsupported("KV cache", ["the model has no layers"])
    if encoders and (by_spec or states):
        raise Unsupported(
            "KV cache", ["the model mixes encoder layers, which need whole prompts in a step, with layers that cache"]
        )
    layer_groups, layer_buffers = [0] * len(held), [0] * len(held)
    group_sizes: list[int] = []
    group_specs: list[PagedSpec] = []
    sizes = _block_sizes(list(by_spec), backend_for, block_size) if by_spec else {}
    num_groups = _groups_by_spec(by_spec, stages) if by_spec else {}
    held_by_spec = {spec: [layer for layer in layers if layer in held] for spec, layers in by_spec.items()}
    num_buffers = max((cdiv(len(layers), num_groups[spec]) for spec, layers in held_by_spec.items()), default=0)
    for paged, layers in held_by_spec.items():
        for place, layer in enumerate(layers):
            group, buffer = divmod(place, num_buffers)
            layer_groups[layer - held.start], layer_buffers[layer - held.start] = len(group_sizes) + group, buffer
        group_sizes += [sizes[paged]] * num_groups[paged]
        group_specs += [paged] * num_groups[paged]
    state_bytes = num_states = 0
    for group, (state, layers) in enumerate(states.items(), start=len(group_specs)):
        for layer in layers:
            if layer in held:
                layer_groups[layer - held.start], layer_buffers[layer - held.start] = group, num_states
                num_states += 1
                state_bytes += cast(StateBackend, backend_for(state)).state_bytes()
    for group, layers in enumerate(encoders.values()):
        for layer in layers:
            layer_groups[layer] = group
    return KVPlan(
        block_sizes=tuple(group_sizes),
        layer_groups=tuple(layer_groups),
        layer_buffers=tuple(layer_buffers),
        num_buffers=num_buffers,
        page_bytes=_paged(backend_for, group_specs[0]).kv_layout().page_bytes(group_sizes[0]) if group_specs else 0,
        specs=tuple(group_specs),
        states=tuple(states),
        state_bytes=state_bytes,
        encoders=tuple(encoders),
    )


def _groups_by_spec(by_spec: dict[PagedSpec, list[int]], stages: Sequence[range]) -> dict[PagedSpec, int]:
    """How many groups the layers of each spec form: enough for the stage that has most of them."""
    most = {spec: max(sum(layer in held for layer in layers) for held in stages) for spec, layers in by_spec.items()}
    size = _group_size(most)
    return {spec: cdiv(count, size) for spec, count in most.items()}


def _paged(backend_for: BackendFor, spec: PagedSpec) -> PagedBackend:
    return cast(PagedBackend, backend_for(spec))


def _group_size(counts: dict[PagedSpec, int]) -> int:
    """How many layers a group has, by what the last group of each spec leaves unused and by how many groups there are;
    of equally good sizes the larger one."""
    held = {spec: min(spec.window or _TYPICAL_TOKENS, _TYPICAL_TOKENS) for spec in counts}
    used = sum(count * held[spec] for spec, count in counts.items())

    def cost(size: int) -> float:
        unused = sum(-count % size * held[spec] for spec, count in counts.items())
        groups = sum(cdiv(count, size) for count in counts.values())
        return unused / used + _GROUP_COST * groups

    return min(range(max(counts.values()), 0, -1), key=cost)


def _block_sizes(specs: Sequence[PagedSpec], backend_for: BackendFor, asked: int | None) -> dict[PagedSpec, int]:
    """Tokens of a block of the pool, by spec; `asked` are those of a block on a device."""
    layouts = [_paged(backend_for, spec).kv_layout() for spec in specs]
    first, ranks = layouts[0], contexts_of(backend_for(specs[0]))
    on_a_rank = [size // ranks for size in first.block_sizes]
    if asked is not None and asked not in on_a_rank:
        raise ConfigError(
            f"block_size {asked} is not among those of the attention backend {backend_for(specs[0]).name}: "
            f"{among(asked, on_a_rank)}; set --block-size"
        )
    for size in (asked * ranks,) if asked is not None else first.block_sizes:
        page = first.page_bytes(size)
        fitting = [next((s for s in layout.block_sizes if layout.page_bytes(s) == page), None) for layout in layouts]
        if all(fitting):
            return {spec: fit for spec, fit in zip(specs, fitting, strict=True) if fit}
    raise Unsupported("KV cache", ["no block sizes give all layer groups pages of the same bytes"])


def kv_cache_config(plan: KVPlan, num_blocks: int, num_states: int) -> KVCacheConfig:
    """The torch-free form, for the engine. All state layers are one group of it: a sequence has one block in them."""
    num_groups = len(plan.specs) + len(plan.states)
    layers_of = [
        tuple(layer for layer, held_in in enumerate(plan.layer_groups) if held_in == group)
        for group in range(num_groups)
    ]
    groups: list[CacheGroup] = [
        KVGroup(block_size=size, window=spec.window, layers=layers)
        for size, spec, layers in zip(plan.block_sizes, plan.specs, layers_of, strict=False)
    ]
    if plan.states:
        groups.append(StateGroup(tuple(sorted(sum(layers_of[len(plan.specs) :], ())))))
    return KVCacheConfig(num_blocks=num_blocks, groups=tuple(groups), num_states=num_states)


def fresh_state(program: StepProgram, plan: KVPlan, num_blocks: int, num_states: int) -> Any:
    """A program's first state. One that serves no states need not know of them."""
    return program.initial_state(num_blocks, num_states) if plan.states else program.initial_state(num_blocks)
