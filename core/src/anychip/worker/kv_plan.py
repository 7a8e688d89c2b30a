"""Lays out the KV cache: groups layers by what they need, picks block sizes whose pages match."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from anychip.errors import ConfigError, Unsupported
from anychip.messages import KVCacheConfig, KVGroup
from anychip.plugin_api import AttentionBackend, AttentionSpec, KVPlan
from anychip.plugin_api.refusals import among
from anychip.types import cdiv

_GROUP_COST = 15 / 900
"""What one more group costs: its tables, slot mappings and plans take about 15 microseconds of a step of 256 rows, of
the 900 that a step takes on the host. KV memory that lies unused costs throughput by the same share."""
_TYPICAL_TOKENS = 4096
"""Of the request whose unused memory is counted: a layer without a window holds all of them, others their window."""


def plan_kv(
    specs: Sequence[AttentionSpec],
    backend_for: Callable[[AttentionSpec], AttentionBackend],
    block_size: int | None,
) -> KVPlan:
    """`specs` by layer. Layers of one spec form groups of at most `num_buffers` layers; a group's n-th layer lies in
    the pool's n-th buffer, so a block id means the same bytes in every group and belongs to one at a time.

    Raises ConfigError for a block size that the backend lacks, Unsupported for layers whose pages cannot match, and
    for a model without attention.
    """
    if not specs:
        raise Unsupported(
            "KV cache", ["the model has no attention layer, and requests are scheduled by their KV blocks"]
        )
    by_spec: dict[AttentionSpec, list[int]] = {}
    for layer, spec in enumerate(specs):
        by_spec.setdefault(spec, []).append(layer)
    sizes = _block_sizes(list(by_spec), backend_for, block_size)
    num_buffers = _group_size({spec: len(layers) for spec, layers in by_spec.items()})
    layer_groups, layer_buffers = [0] * len(specs), [0] * len(specs)
    group_sizes: list[int] = []
    group_specs: list[AttentionSpec] = []
    for spec, layers in by_spec.items():
        for start in range(0, len(layers), num_buffers):
            for buffer, layer in enumerate(layers[start : start + num_buffers]):
                layer_groups[layer], layer_buffers[layer] = len(group_sizes), buffer
            group_sizes.append(sizes[spec])
            group_specs.append(spec)
    first = group_specs[0]
    return KVPlan(
        block_sizes=tuple(group_sizes),
        layer_groups=tuple(layer_groups),
        layer_buffers=tuple(layer_buffers),
        num_buffers=num_buffers,
        page_bytes=backend_for(first).kv_layout().page_bytes(sizes[first]),
        specs=tuple(group_specs),
    )


def _group_size(counts: dict[AttentionSpec, int]) -> int:
    """How many layers a group has, by what the last group of each spec leaves unused and by how many groups there are;
    of equally good sizes the larger one."""
    held = {spec: min(spec.window or _TYPICAL_TOKENS, _TYPICAL_TOKENS) for spec in counts}
    used = sum(count * held[spec] for spec, count in counts.items())

    def cost(size: int) -> float:
        unused = sum(-count % size * held[spec] for spec, count in counts.items())
        groups = sum(cdiv(count, size) for count in counts.values())
        return unused / used + _GROUP_COST * groups

    return min(range(max(counts.values()), 0, -1), key=cost)


def _block_sizes(
    specs: Sequence[AttentionSpec],
    backend_for: Callable[[AttentionSpec], AttentionBackend],
    asked: int | None,
) -> dict[AttentionSpec, int]:
    layouts = [backend_for(spec).kv_layout() for spec in specs]
    first = layouts[0]
    if asked is not None and asked not in first.block_sizes:
        raise ConfigError(
            f"block_size {asked} is not among those of the attention backend {backend_for(specs[0]).name}: "
            f"{among(asked, first.block_sizes)}; set --block-size"
        )
    for size in (asked,) if asked is not None else first.block_sizes:
        page = first.page_bytes(size)
        fitting = [next((s for s in layout.block_sizes if layout.page_bytes(s) == page), None) for layout in layouts]
        if all(fitting):
            return {spec: fit for spec, fit in zip(specs, fitting, strict=True) if fit}
    raise Unsupported("KV cache", ["no block sizes give all layer groups pages of the same bytes"])


def kv_cache_config(plan: KVPlan, num_blocks: int) -> KVCacheConfig:
    """The torch-free form, for the engine."""
    return KVCacheConfig(
        num_blocks=num_blocks,
        groups=tuple(
            KVGroup(
                block_size=size,
                window=spec.window,
                layers=tuple(layer for layer, g in enumerate(plan.layer_groups) if g == index),
            )
            for index, (size, spec) in enumerate(zip(plan.block_sizes, plan.specs, strict=True))
        ),
    )
