"""What a worker works out before it loads anything: the model's source, the KV cache's layout, limits, shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from anychip.config import EngineConfig, WorkerSpec
from anychip.model_config import ModelConfig
from anychip.ops.table import OpTable
from anychip.plugin_api import (
    AttentionBackend,
    AttentionSpec,
    GroupSpec,
    KVPlan,
    PeakMemory,
    Platform,
    ShapeKey,
    ShapePolicy,
    StepLimits,
)
from anychip.worker.input_batch import InputBatch
from anychip.worker.kv_plan import count_blocks, plan_kv
from anychip.worker.model_source import CheckpointSource
from anychip.worker.sizing import affordable_graphs, kv_budget, step_limits
from anychip.worker.staging import StagingRing


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

    def num_blocks(self, activations: PeakMemory, graphs: int, *, pending: int = 0) -> int:
        """Of the KV cache; `pending` bytes are not taken yet and will be."""
        return count_blocks(
            self.config,
            self.kv,
            budget=kv_budget(self.platform, self.config, activations, graphs, pending=pending),
            max_model_len=self.limits.max_model_len,
            max_slots=self.platform.capabilities.max_slots,
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
    limits = step_limits(config, model, platform, kv)
    policy = platform.shape_policy(limits)
    return Preparation(
        config=config,
        model=model,
        platform=platform,
        source=source,
        num_shards=size,
        kv=kv,
        limits=limits,
        policy=policy,
        keys=affordable_graphs(platform, policy),
        pieces=policy.pieces(),
    )
