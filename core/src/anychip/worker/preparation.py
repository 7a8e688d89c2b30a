"""What a worker works out before it loads anything: the model's source, the KV cache's layout, limits, shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from anychip.config import EngineConfig, WorkerSpec
from anychip.errors import ConfigError
from anychip.model_config import ModelConfig, rope_parameters
from anychip.ops.table import OpTable
from anychip.plugin_api import (
    FINAL,
    TAPS,
    AttentionBackend,
    AttentionSpec,
    GraphLevel,
    GroupSpec,
    KVPlan,
    Platform,
    ShapeKey,
    ShapePolicy,
    StepLimits,
    edit_state_bytes,
)
from anychip.plugin_api.version import check_shape_policy
from anychip.types import cdiv
from anychip.worker.input_batch import InputBatch
from anychip.worker.kv_plan import plan_kv
from anychip.worker.model_source import CheckpointSource
from anychip.worker.staging import StagingRing

_GRAPHS_SHARE = 0.1
"""Of the memory that is free before weights are loaded, what graphs may take at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    config: EngineConfig
    model: ModelConfig
    platform: Platform
    source: CheckpointSource
    num_shards: int
    kv: KVPlan
    limits: StepLimits
    policy: ShapePolicy
    keys: Sequence[ShapeKey]
    """Of graphs."""
    pieces: Sequence[int]
    """Numbers of tokens of steps that are captured in pieces."""

    @property
    def state_bytes(self) -> int:
        """Of a program's state beside the KV cache: penalties and biases, and the buffer of embeddings."""
        embeddings = 4 * self.limits.max_embeddings * self.model.hidden_size
        return edit_state_bytes(self.limits.max_slots, self.model.vocab_size) + embeddings

    @property
    def graph_bytes(self) -> int:
        """What captures will need. Where there are taps, pieces are captured with them and without."""
        pieces = [*self.pieces] * (2 if self.limits.taps else 1)
        return self.platform.graph_capture().reserve(self.keys, pieces)

    def new_batch(self) -> InputBatch:
        capabilities = self.platform.capabilities
        return InputBatch(
            limits=self.limits,
            block_sizes=self.kv.block_sizes,
            slot_dtype=capabilities.slot_dtype,
            dummy_padding=capabilities.padding == "dummy_request",
            vocab_size=self.model.vocab_size,
            policy=self.policy,
            ring=StagingRing(self.platform, depth=2 * (self.config.max_in_flight + 1)),
        )

    def tp_group(self, spec: WorkerSpec) -> GroupSpec:
        """The ranks that share the model's layers."""
        widest = max(self.model.hidden_size, self.model.vocab_size)
        return GroupSpec(
            ranks=tuple(range(spec.world_size)),
            rank=spec.rank,
            purpose="tp",
            max_message_bytes=4 * self.limits.max_num_tokens * widest,
            store=spec.store,
            timeout_s=spec.config.timeout_s,
        )


def prepare(
    spec: WorkerSpec,
    model: ModelConfig,
    platform: Platform,
    ops: OpTable,
    contributed: dict[str, str],
    *,
    per_host: bool,
) -> Preparation:
    """`per_host`: one process drives all devices, and its step program shards the model by itself."""
    config = spec.config
    source = CheckpointSource(config=config, model=model, platform=platform, ops=ops, contributed=contributed)
    size = len(spec.device_indexes) if per_host else spec.world_size
    backend_for: Callable[[AttentionSpec], AttentionBackend] = cache(platform.attention)
    kv = plan_kv(source.attention_specs(size), backend_for, config.block_size)
    limits = _step_limits(config, model, platform, kv)
    policy = platform.shape_policy(limits)
    check_shape_policy(platform.context.manifest.package, policy.bucket)
    return Preparation(
        config=config,
        model=model,
        platform=platform,
        source=source,
        num_shards=size,
        kv=kv,
        limits=limits,
        policy=policy,
        keys=_affordable_graphs(platform, policy, limits),
        pieces=policy.pieces(),
    )


def _step_limits(config: EngineConfig, model: ModelConfig, platform: Platform, kv: KVPlan) -> StepLimits:
    """The configuration's limits within the device's. No step has more tokens than its rows may be long."""
    rules = platform.step_rules
    length = config.max_model_len or model.max_positions
    rows = min(config.resolved_max_num_seqs, rules.max_rows or config.resolved_max_num_seqs)
    bounds = (config.resolved_max_num_batched_tokens, rules.max_tokens, rules.max_padded_tokens, rows * length)
    return StepLimits(
        max_num_tokens=min(bound for bound in bounds if bound is not None),
        max_num_reqs=rows,
        max_model_len=length,
        max_slots=config.resolved_max_num_seqs,
        max_pages=tuple(cdiv(length, size) for size in kv.block_sizes),
        max_drafts=config.max_drafts if config.speculate is not None and rules.takes_drafts else 0,
        taps=_checked_taps(config, model),
        pools=config.pooling,
        max_embeddings=config.max_embeddings,
        mrope="mrope_section" in rope_parameters(model),
    )


def _checked_taps(config: EngineConfig, model: ModelConfig) -> tuple[int, ...]:
    for layer in config.taps:
        if not FINAL <= layer < model.num_layers:
            raise ConfigError(
                f"taps names layer {layer}; the model has 0 to {model.num_layers - 1}, and {FINAL} for the final norm"
            )
    return config.taps


def _affordable_graphs(platform: Platform, policy: ShapePolicy, limits: StepLimits) -> list[ShapeKey]:
    """The policy's shapes, as far as graphs of them fit into their share of the free memory. Where there are taps, each
    shape has a graph with them and one without."""
    free = platform.memory(platform.context.device_indexes[0]).free
    graphs = platform.graph_capture()
    keys = policy.keys()
    if limits.taps and graphs.level >= GraphLevel.FULL:
        keys = [replace(key, features=features) for key in keys for features in (key.features, (TAPS,))]
    return list(keys if free is None else graphs.affordable(keys, int(free * _GRAPHS_SHARE)))
