"""What a draft model or a head needs of a worker: its source, its cache under the target's blocks, limits and shapes.

docs/decisions/0042 says why its cache lies there, and 0051 what a head needs beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import cast

import msgspec

from anychip.config import EngineConfig
from anychip.errors import ConfigError, Unsupported
from anychip.head_config import HeadConfig, load_head_config, load_medusa_config
from anychip.model_config import ModelConfig, load_model_config
from anychip.models.eagle import EagleFamily
from anychip.models.head_parts import OWN_TAP, HeadFamily
from anychip.models.medusa import MedusaFamily
from anychip.models.mtp import MtpFamily
from anychip.models.registry import ModelFamily, find_family
from anychip.mtp_config import load_mtp_config
from anychip.ops.table import OpTable
from anychip.plugin_api import (
    FINAL,
    TAPS,
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
from anychip.process_specs import WorkerSpec
from anychip.weights.gguf_checkpoint import open_checkpoint
from anychip.worker.head_steps import HEAD_FEATURES, HeadShapes, num_feature_rows
from anychip.worker.kv_plan import BackendFor
from anychip.worker.model_source import CheckpointSource
from anychip.worker.preparation import Preparation, prepare
from anychip.worker.step_limits import affordable_graphs


def prepare_all(
    spec: WorkerSpec,
    model: ModelConfig,
    platform: Platform,
    ops: OpTable,
    contributed: dict[str, str],
    quant_formats: Mapping[str, str] | None = None,
) -> Preparation:
    """`prepare`, with the part of the draft model or the head where the configuration names one and the device takes
    drafts. Raises Unsupported where the device cannot run a second model, or the caches do not fit together."""
    config = spec.config
    target = prepare(spec, model, platform, ops, contributed, quant_formats)
    if not config.drafts_in_workers or not target.limits.max_drafts:
        return target
    what = "a draft model" if config.draft_model is not None else "a head that drafts"
    if platform.context.manifest.seam == "step":
        raise Unsupported(
            platform.name,
            [f"{what}: its step program runs one model; --speculate ngram, suffix and auto need no second one"],
        )
    head = _head(config, model)
    if config.draft_model is None:
        taps = (FINAL,) if head is None else head.taps
        spec = msgspec.structs.replace(spec, config=msgspec.structs.replace(config, taps=taps))
        target = prepare(spec, model, platform, ops, contributed, quant_formats)
        if target.keys:  # else its steps are not captured
            target = replace(target, keys=affordable_graphs(platform, target.policy, target.limits, always=(TAPS,)))
    source = _source(target, head, ops, contributed, quant_formats)
    if config.medusa_heads is not None:
        return replace(target, medusa=source)
    backend_for: Callable[[CacheSpec], CacheBackend] = cache(platform.cache_backend)
    kv, group = plan_under(source.attention_specs(target.mesh_shape), backend_for, target.kv)
    limits = replace(
        target.limits,
        max_drafts=0,
        max_pages=(target.limits.max_pages[group],) * len(kv.specs),
        taps=() if head is None else (OWN_TAP,),
        pools=False,
        max_embeddings=0 if head is None else num_feature_rows(target.limits, config.max_in_flight),
        mrope=False,
        max_adapters=0,
        max_adapter_rank=0,
    )
    policy, always = platform.shape_policy(limits), () if head is None else HEAD_FEATURES
    draft = replace(
        target,
        config=source.config,
        model=source.model,
        source=source,
        kv=kv,
        limits=limits,
        policy=policy if head is None else HeadShapes(policy),
        keys=affordable_graphs(platform, policy, limits, always=always),
        pieces=policy.pieces() if head is None else (),
        lies_under=group,
        head=head,
    )
    return replace(target, draft=draft)


def _head(config: EngineConfig, target: ModelConfig) -> HeadConfig | None:
    """The head that follows the target's steps, where one does."""
    if config.own_head:
        return load_mtp_config(target)
    return None if config.draft_head is None else load_head_config(config.draft_head, target)


def _source(
    target: Preparation,
    head: HeadConfig | None,
    ops: OpTable,
    contributed: dict[str, str],
    quant_formats: Mapping[str, str] | None,
) -> CheckpointSource:
    """Of the draft model, in its own dtype, or of the heads, in the target's: they read its hidden states."""
    family: HeadFamily | None = None
    if head is not None and head.kind == "MTP":
        model = head.model
        family = MtpFamily(
            head, find_family(target.model, target.config, contributed), _names(target.config, model.folder)
        )
    elif head is not None:
        model = head.model
        family = EagleFamily(head, _names(target.config, model.folder))
    elif target.config.medusa_heads is not None:
        medusa = load_medusa_config(target.config.medusa_heads, target.model)
        model = msgspec.structs.replace(target.model, folder=medusa.folder, raw={})
        family = MedusaFamily(medusa, _names(target.config, model.folder))
    else:
        model = load_model_config(target.config.draft_model or "")
    config = msgspec.structs.replace(
        target.config,
        model=model.folder,
        model_impl="native",
        quantization=target.config.quantization if target.config.own_head else None,
        revision=None,
        speculate=None,
        taps=(),
        pooling=False,
        max_embeddings=0,
        adapters={},
        max_adapters=0,
        expert_parallel=False,
        eplb_interval=None,
        num_redundant_experts=0,
        dtype=target.config.dtype if family is None else target.source.dtype,
    )
    return CheckpointSource(
        config=config,
        model=model,
        platform=target.platform,
        ops=ops,
        contributed=contributed,
        quant_formats=quant_formats,
        family=cast(ModelFamily | None, family),  # Medusa heads are layers that run no step
    )


def _names(config: EngineConfig, folder: str) -> frozenset[str]:
    """Of a checkpoint's tensors; none where weights are made up."""
    return frozenset() if config.load_format == "dummy" else open_checkpoint(Path(folder)).names


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
