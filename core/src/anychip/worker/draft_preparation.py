"""What a draft model needs of a worker: its source, its cache under the target's blocks, limits and shapes.

docs/decisions/0042 says why its cache lies there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import cast

import msgspec

from anychip.config import WorkerSpec
from anychip.errors import ConfigError, Unsupported
from anychip.model_config import ModelConfig, load_model_config
from anychip.ops.table import OpTable
from anychip.plugin_api import (
    CacheBackend,
    CacheSpec,
    EncoderSpec,
    KVPlan,
    PagedBackend,
    PagedSpec,
    Platform,
    StateSpec,
)
from anychip.plugin_api.refusals import among
from anychip.worker.kv_plan import BackendFor
from anychip.worker.model_source import CheckpointSource
from anychip.worker.preparation import Preparation, affordable_graphs, prepare


def prepare_all(
    spec: WorkerSpec,
    model: ModelConfig,
    platform: Platform,
    ops: OpTable,
    contributed: dict[str, str],
    quant_formats: Mapping[str, str] | None = None,
) -> Preparation:
    """`prepare`, with the draft model's part where the configuration names one and the device takes drafts. Raises
    Unsupported where the device cannot run a second model, or the caches do not fit together."""
    target = prepare(spec, model, platform, ops, contributed, quant_formats)
    name = spec.config.draft_model
    if name is None or not target.limits.max_drafts:
        return target
    if platform.context.manifest.seam == "step":
        raise Unsupported(
            platform.name,
            ["a draft model: its step program runs one model; --speculate ngram, suffix and auto need no second one"],
        )
    config = msgspec.structs.replace(
        spec.config,
        model=name,
        model_impl="native",
        quantization=None,
        revision=None,
        speculate=None,
        taps=(),
        pooling=False,
        max_embeddings=0,
        adapters={},
        max_adapters=0,
    )
    source = CheckpointSource(
        config=config,
        model=load_model_config(name),
        platform=platform,
        ops=ops,
        contributed=contributed,
        quant_formats=quant_formats,
    )
    backend_for: Callable[[CacheSpec], CacheBackend] = cache(platform.cache_backend)
    kv, group = plan_under(source.attention_specs(target.mesh_shape), backend_for, target.kv)
    limits = replace(
        target.limits,
        max_drafts=0,
        max_pages=(target.limits.max_pages[group],) * len(kv.specs),
        taps=(),
        pools=False,
        max_embeddings=0,
        mrope=False,
        max_adapters=0,
        max_adapter_rank=0,
    )
    policy = platform.shape_policy(limits)
    draft = replace(
        target,
        config=config,
        model=source.model,
        source=source,
        kv=kv,
        limits=limits,
        policy=policy,
        keys=affordable_graphs(platform, policy, limits),
        pieces=policy.pieces(),
        lies_under=group,
    )
    return replace(target, draft=draft)


def plan_under(specs: Sequence[CacheSpec], backend_for: BackendFor, target: KVPlan) -> tuple[KVPlan, int]:
    """The draft model's cache, and the target's group whose blocks it lies under. Its layers of one spec form a group,
    for they are planned together; all groups have the same blocks, so every layer has a buffer of its own. Raises
    Unsupported, with what does not fit."""
    by_spec: list[PagedSpec] = []
    for spec in dict.fromkeys(specs):
        if isinstance(spec, StateSpec | EncoderSpec):
            raise Unsupported("draft model", [f"a layer that keeps no page by token ({type(spec).__name__})"])
        by_spec.append(spec)
    group = _group_for(target, [spec.window for spec in by_spec])
    size = target.block_sizes[group]
    pages = set()
    for paged in by_spec:
        backend = cast(PagedBackend, backend_for(paged))
        layout = backend.kv_layout()
        if size not in layout.block_sizes:
            raise ConfigError(
                f"the target's blocks have {size} tokens, which the draft model's attention backend {backend.name} "
                f"lacks: {among(size, layout.block_sizes)}; set --block-size to one that both have"
            )
        pages.add(layout.page_bytes(size))
    if len(pages) > 1:
        raise Unsupported("draft model", [f"layers whose pages differ in size: {sorted(pages)} bytes"])
    groups: dict[CacheSpec, int] = {spec: group for group, spec in enumerate(by_spec)}
    plan = KVPlan(
        block_sizes=(size,) * len(by_spec),
        layer_groups=tuple(groups[spec] for spec in specs),
        layer_buffers=tuple(range(len(specs))),
        num_buffers=len(specs),
        page_bytes=pages.pop(),
        specs=tuple(by_spec),
    )
    return plan, group


def _group_for(target: KVPlan, windows: Sequence[int | None]) -> int:
    """The first group whose blocks stay as long as layers of these windows need them."""
    window = None if None in windows else max(window or 0 for window in windows)
    for group, spec in enumerate(target.specs):
        if spec.window is None or (window is not None and spec.window >= window):
            return group
    needed = "all earlier tokens" if window is None else f"a window of {window} tokens"
    kept = ", ".join(str(spec.window) for spec in target.specs)
    raise Unsupported("draft model", [f"layers that see {needed}: the target keeps windows of {kept} tokens alone"])
