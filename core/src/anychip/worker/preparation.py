"""What a worker works out before it loads anything: the model's source, the mesh, the KV cache's layout, shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import msgspec

from anychip.config import EngineConfig
from anychip.errors import Unsupported
from anychip.head_config import HeadConfig
from anychip.layers.context_parallel import cache_backend
from anychip.model_config import ModelConfig
from anychip.ops.table import OpTable
from anychip.plugin_api import (
    CacheBackend,
    CacheSpec,
    Communicator,
    CompileReport,
    GroupSpec,
    KVPlan,
    Mesh,
    MeshShape,
    Platform,
    ShapeKey,
    ShapePolicy,
    StepLimits,
    edit_state_bytes,
)
from anychip.plugin_api.version import check_shape_policy
from anychip.process_specs import WorkerSpec
from anychip.tasks.detect import served_task
from anychip.types import cdiv, itemsize
from anychip.worker.absent_ranks import AbsentRanks
from anychip.worker.contexts import check_contexts_of, context_note, gathered_elements
from anychip.worker.expert_ranks import described_over_lanes, with_experts
from anychip.worker.head_steps import HeadSteps, tap_every_token
from anychip.worker.input_batch import InputBatch
from anychip.worker.kv_plan import plan_kv
from anychip.worker.model_source import CheckpointSource
from anychip.worker.returning_ids import ReturningIds
from anychip.worker.staging import StagingRing
from anychip.worker.step_limits import affordable_graphs, step_limits
from anychip.worker.vector_head import VectorHead, load_head
from anychip.worker_report import DeviceRules

_SLOTS_PER_SPARE_STATE = 8
"""A sequence that ends keeps its state's block until the steps in flight are done, and who takes its slot needs another
one meanwhile. Few end in one step; where all spares are taken, the next sequence enters a step later."""
_SLOTS_PER_KEPT_STATE = 2
"""Of the states that the prefix cache offers beside those of running sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    config: EngineConfig
    model: ModelConfig
    platform: Platform
    source: CheckpointSource
    mesh_shape: MeshShape
    """Of the ranks that share the model."""
    kv: KVPlan
    limits: StepLimits
    policy: ShapePolicy
    keys: Sequence[ShapeKey]
    """Of graphs."""
    pieces: Sequence[int]
    """Numbers of tokens of steps that are captured in pieces."""
    draft: Preparation | None = None
    """The draft model's, which runs beside this one."""
    lies_under: int | None = None
    """Of a draft model: the target's group under whose blocks its cache lies."""
    head: HeadConfig | None = None
    """What the draft model is a head by; None: it is a model of its own."""
    medusa: CheckpointSource | None = None
    """Of heads that read this model's final hidden states."""

    def new_batch(self) -> InputBatch:
        capabilities = self.platform.capabilities
        batch = InputBatch(
            limits=self.limits,
            block_sizes=self.kv.block_sizes,
            slot_dtype=capabilities.slot_dtype,
            dummy_padding=capabilities.padding == "dummy_request",
            vocab_size=self.model.vocab_size,
            policy=self.policy,
            ring=StagingRing(self.platform, depth=2 * (self.config.max_in_flight + 1)),
            states=bool(self.kv.states),
        )
        if self.head is not None:
            batch.every_step = HeadSteps()
        elif self.medusa is not None or (self.draft is not None and self.draft.head is not None):
            batch.every_step = tap_every_token
        return batch

    def unless_refused(self, report: CompileReport) -> Preparation:
        """This, or where the device could not capture the model's steps the same with steps of their own sizes."""
        return replace(self, policy=ShapePolicy()) if report.refused else self

    @property
    def rules(self) -> DeviceRules:
        """The device's; where tokens of a sequence see those behind them, a prompt is never cut as well."""
        rules = self.platform.step_rules.for_device(self.platform.capabilities)
        if self.draws:
            return rules
        return msgspec.structs.replace(rules, chunk_multiple=self.limits.max_model_len)

    @property
    def draws(self) -> bool:
        """Whether the model can draw tokens: an encoder gives vectors alone."""
        return not self.kv.encoders

    @property
    def edits(self) -> bool:
        """Whether this rank draws tokens, for which it keeps what edits their logits."""
        return self.draws and self.source.stage.is_last

    @property
    def drafts(self) -> CheckpointSource | None:
        """Of the draft model or the heads; None: nothing drafts in the workers."""
        return self.medusa if self.draft is None else self.draft.source

    @property
    def num_states(self) -> int:
        """Blocks of the states' pool: one for each slot, some for sequences that enter before the steps in flight have
        let go of the last ones, those that the prefix cache offers, and block 0. 0 for a model without states."""
        slots = self.limits.max_slots
        kept = cdiv(slots, _SLOTS_PER_KEPT_STATE) if self.config.prefix_caching else 0
        return 1 + slots + cdiv(slots, _SLOTS_PER_SPARE_STATE) + kept if self.kv.states else 0

    @property
    def block_bytes(self) -> int:
        """Of one block of tokens, with what the draft model keeps under it."""
        return self.kv.block_bytes + (0 if self.draft is None else self.draft.kv.block_bytes)

    @property
    def kept_bytes(self) -> int:
        """Of what states hold beside the caches: what logits are edited by, and embeddings; of a draft model's state
        what a head reads."""
        limits, model = self.limits, self.model
        embeddings = 4 * limits.max_embeddings * model.hidden_size
        features = 0 if self.draft is None else self.draft.feature_bytes
        edits = edit_state_bytes(limits.max_slots, model.vocab_size) if self.edits else 0
        return edits + embeddings + features

    @property
    def feature_bytes(self) -> int:
        """Of the features that a head reads; 0: it is none."""
        if self.head is None:
            return 0
        return self.limits.max_embeddings * self.model.hidden_size * itemsize(self.source.dtype)

    @property
    def graph_bytes(self) -> int:
        """Bytes that the platform sets aside for graphs. With taps, pieces are captured twice."""
        pieces = [*self.pieces] * (2 if self.limits.taps else 1)
        reserved = self.platform.graph_capture().reserve(self.keys, pieces)
        return reserved if self.draft is None else reserved + self.draft.graph_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What the model's layers rule out of what was asked for, and what the rank's stage holds."""
        unused = self.kv.states and self.config.speculate is not None
        found = ("a state cannot give a token back: no drafts for this model",) if unused else ()
        stage, shape = self.source.stage, self.mesh_shape
        token_bytes = self.model.hidden_size * itemsize(self.source.dtype)
        if self.config.lanes_meet:
            found = (*found, described_over_lanes(shape, token_bytes))
        if shape.cp > 1:
            found = (*found, context_note(self.kv, shape))
        if stage.count == 1:
            return found
        return (*found, stage.described(self.model.num_layers, token_bytes))

    def vector_head(self) -> VectorHead | None:
        """What makes of pooled vectors what the model's files describe; None: nothing does."""
        if self.config.task in ("auto", "generate") or self.config.load_format == "dummy":
            return None
        return load_head(served_task(self.config, self.model), Path(self.model.folder))

    def returning_ids(self, mesh: Mesh) -> ReturningIds | None:
        """What brings drawn ids back to the first stage; None: all layers are on one."""
        stage = self.source.stage
        return ReturningIds(stage, mesh.axis("pp")) if stage.count > 1 else None

    def mesh(self, spec: WorkerSpec, communicator: Callable[[GroupSpec], Communicator]) -> Mesh:
        """The mesh as a worker's rank sees it, over the collectives that `communicator` opens."""
        draft = self.draft or self  # its layers send their sums the same ways
        gathered = gathered_elements(self.kv.specs) if self.mesh_shape.cp > 1 else 0
        widest = max(self.model.hidden_size, self.model.vocab_size, draft.model.hidden_size, gathered)
        return Mesh(
            self.mesh_shape,
            spec.rank,
            communicator,
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
    quant_formats: Mapping[str, str] | None = None,
) -> Preparation:
    """`contributed` and `quant_formats` as CheckpointSource has them."""
    config = spec.config
    if config.resolved_max_adapters and not platform.capabilities.lora:
        raise Unsupported(platform.name, ["adapters (LoRA): leave --adapter and --max-adapters out"])
    source = CheckpointSource(
        config=config,
        model=model,
        platform=platform,
        ops=ops,
        contributed=contributed,
        quant_formats=quant_formats,
    )
    shape = _mesh_shape(spec, platform)
    specs = source.attention_specs(shape)
    stages = source.take_stage(shape, spec.rank) if shape.pp > 1 else None
    if shape.cp > 1:
        check_contexts_of(specs, shape, source.architecture, platform)
    absent = Mesh(shape, spec.rank, AbsentRanks)
    backend_for: Callable[[CacheSpec], CacheBackend] = cache(lambda each: cache_backend(platform, each, absent))
    kv = plan_kv(specs, backend_for, config.block_size, stages=stages, own=source.stage.index)
    limits = step_limits(config, model, platform, kv)
    policy = platform.shape_policy(limits)
    check_shape_policy(platform.context.manifest.package, policy.bucket)
    # Graphs are of steps of one token a row, and of what lies between attention over a cache. Tokens that travel to
    # their experts are counted by the host, which no capture takes. Plans over several contexts are made anew.
    captured = not (kv.encoders or config.tokens_travel or shape.cp > 1)
    return Preparation(
        config=config,
        model=model,
        platform=platform,
        source=source,
        mesh_shape=shape,
        kv=kv,
        limits=limits,
        policy=policy,
        keys=affordable_graphs(platform, policy, limits) if captured else (),
        pieces=policy.pieces() if captured else (),
    )


def _mesh_shape(spec: WorkerSpec, platform: Platform) -> MeshShape:
    """Of the devices of one process, whose step program divides the model by itself; or of processes, one device each.
    Raises Unsupported for both at once."""
    devices, sizes = platform.device_mesh, spec.config.parallel_sizes
    if devices.size > 1 and spec.world_size > 1:
        raise Unsupported(
            platform.name, [f"{spec.world_size} processes that each drive {devices.size} devices; one of both is 1"]
        )
    asked = [f"axis {axis} of {size} ranks" for axis, size in (("pp", sizes.pp), ("cp", sizes.cp)) if size > 1]
    if asked and platform.context.manifest.seam == "step":
        raise Unsupported(platform.name, [f"{axis}: its step program runs whole models" for axis in asked])
    of_processes = MeshShape(
        pp=sizes.pp, dp=sizes.dp, cp=sizes.cp, tp=spec.world_size // (sizes.pp * sizes.dp * sizes.cp)
    )
    shape = devices if devices.size > 1 else of_processes
    return with_experts(shape, spec.config, platform) if spec.config.expert_parallel else shape
