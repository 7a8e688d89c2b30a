"""Lays out the KV cache: groups layers by what they need, picks block sizes whose pages match, counts blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from anychip.config import EngineConfig
from anychip.errors import ConfigError, KVCacheTooSmall, Unsupported
from anychip.messages import KVCacheConfig, KVGroup
from anychip.plugin_api import AttentionBackend, AttentionSpec, KVPlan
from anychip.plugin_api.refusals import among
from anychip.types import cdiv


def plan_kv(
    specs: Sequence[AttentionSpec],
    backend_for: Callable[[AttentionSpec], AttentionBackend],
    block_size: int | None,
) -> KVPlan:
    """`specs` by layer. Layers of one spec form groups of equally many layers; a group's n-th layer lies in the
    pool's n-th buffer, so a block id means the same bytes in every group and belongs to one at a time."""
    by_spec: dict[AttentionSpec, list[int]] = {}
    for layer, spec in enumerate(specs):
        by_spec.setdefault(spec, []).append(layer)
    sizes = _block_sizes(list(by_spec), backend_for, block_size)
    num_buffers = min(len(layers) for layers in by_spec.values())
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


def count_blocks(
    config: EngineConfig, plan: KVPlan, *, budget: int | None, max_model_len: int, max_slots: int | None
) -> int:
    """How many blocks the pool gets, block 0 included. Raises ConfigError when nothing says how large it may be,
    KVCacheTooSmall when not even one block fits."""
    if config.num_kv_blocks is not None:
        count = config.num_kv_blocks
    else:
        nbytes = config.kv_cache_bytes if config.kv_cache_bytes is not None else budget
        if nbytes is None:
            raise ConfigError("the device does not say how much memory is free; give --kv-cache-bytes")
        # More than every slot filled to the model's length can hold is never used.
        useful = 1 + config.most_rows * sum(cdiv(max_model_len, size) for size in plan.block_sizes)
        count = min(nbytes // plan.block_bytes, useful)
    if max_slots is not None:
        count = min(count, max_slots // max(plan.block_sizes))
    if count < 2:
        raise KVCacheTooSmall(
            f"a KV block takes {plan.block_bytes} bytes and fewer than 2 fit; raise --kv-cache-bytes or "
            "--memory-fraction, or free memory on the device"
        )
    return count
