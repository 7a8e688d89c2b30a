"""A worker: one rank's platform, model, KV cache and runner, from a spec to the last step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import numpy as np

from anychip.config import EngineConfig, WorkerSpec
from anychip.errors import DeviceUnavailable
from anychip.messages import LateInputs, MemoryPlan, NewRow, StepDecision, WorkerReady
from anychip.model_config import ModelConfig, load_model_config
from anychip.ops.table import resolve_ops
from anychip.plugin_api import (
    AttentionBackend,
    AttentionSpec,
    GroupSpec,
    KVPlan,
    PeakMemory,
    Platform,
    Shard,
    StepLimits,
    StepProgram,
)
from anychip.registry.devices import candidate
from anychip.registry.plugins import load_plugins
from anychip.types import cdiv
from anychip.worker.input_batch import InputBatch
from anychip.worker.kv_plan import count_blocks, kv_cache_config, plan_kv
from anychip.worker.model_runner import ModelRunner, RunnerResult
from anychip.worker.model_source import CheckpointSource
from anychip.worker.open_platform import open_platform
from anychip.worker.staging import StagingRing
from anychip.worker.torch_program import TorchStepProgram

log = logging.getLogger("anychip.worker")

_GRAPHS_SHARE = 0.1
"""Of the memory that is free once weights are loaded, what graphs may take at most."""


class Worker:
    """Ready for steps once constructed. Raises what kept it from that."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        config = spec.config
        model = load_model_config(config.model)
        plugins = load_plugins()
        manifest = plugins.platforms.get(spec.device)
        if manifest is None:
            raise DeviceUnavailable(f"device {spec.device!r} is not installed in the worker's environment")
        options = manifest.options.parse(manifest.package, config.device_options)
        self.platform = open_platform(
            manifest, device_indexes=spec.device_indexes, options=options, probe=candidate(manifest).probe
        )
        try:
            self.platform.seed(config.seed)
            self.ops = resolve_ops(self.platform.name, self.platform.ops(), require_native=config.require_native)
            self._start(config, model, plugins.models, manifest.topology == "process_per_host")
        except BaseException as error:
            fault = self.platform.explain(error)
            self.platform.close("start failed")
            if fault is not None:
                raise fault from error
            raise

    def _start(self, config: EngineConfig, model: ModelConfig, contributed: dict[str, str], per_host: bool) -> None:
        platform, spec = self.platform, self.spec
        source = CheckpointSource(config=config, model=model, platform=platform, ops=self.ops, contributed=contributed)
        size = len(spec.device_indexes) if per_host else spec.world_size
        backend_for: Callable[[AttentionSpec], AttentionBackend] = cache(platform.attention)
        kv = plan_kv(source.attention_specs(size), backend_for, config.block_size)
        limits = step_limits(config, model, platform, kv)
        program = platform.step_program(source, kv, limits)
        torch_seam = program is None
        if program is None:
            shard = self._shard(limits, model)
            program = TorchStepProgram(
                platform=platform,
                model=source.build(shard),
                ops=self.ops.ops,
                kv=kv,
                limits=limits,
                communicators=[shard.communicator],
            )
        self.program = program

        policy = platform.shape_policy(limits)
        graphs = platform.graph_capture()
        free = platform.memory(platform.context.device_indexes[0]).free
        keys = list(policy.keys())
        if free is not None:
            keys = list(graphs.affordable(keys, int(free * _GRAPHS_SHARE)))
        maximal = policy.bucket(
            num_tokens=limits.max_num_tokens,
            num_reqs=limits.max_num_reqs,
            max_query_len=limits.max_num_tokens,
            num_pages=max(limits.max_pages),
            features=(),
        )

        def new_batch() -> InputBatch:
            return InputBatch(
                limits=limits,
                block_sizes=kv.block_sizes,
                slot_dtype=platform.capabilities.slot_dtype,
                dummy_padding=platform.capabilities.padding == "dummy_request",
                vocab_size=model.vocab_size,
                policy=policy,
                ring=StagingRing(platform, depth=2 * (config.max_in_flight + 1)),
            )

        if torch_seam:
            activations = measure_maximal_step(platform, program, new_batch(), kv, limits)
        else:
            activations = PeakMemory(nbytes=program.memory(maximal), exact=True)
        graph_bytes = graphs.reserve(keys)
        num_blocks = count_blocks(
            config,
            kv,
            budget=kv_budget(platform, config, activations, graph_bytes),
            max_model_len=limits.max_model_len,
            max_slots=platform.capabilities.max_slots,
        )
        state = program.initial_state(num_blocks)
        report = program.warm_up(keys)
        prepared = [f"{report.num_programs} programs prepared in {report.seconds:.2f} s"] if report.num_programs else []
        self.runner = ModelRunner(program, new_batch(), state)
        groups = kv_cache_config(kv, num_blocks)
        per_request = sum(cdiv(limits.max_model_len, group.block_size) for group in groups.groups)
        self.ready = WorkerReady(
            kv=groups,
            rules=platform.step_rules.for_device(platform.capabilities),
            memory=MemoryPlan(
                weights=source.weight_bytes,
                activations=activations.nbytes,
                graphs=graph_bytes,
                kv_cache=num_blocks * kv.block_bytes,
                num_blocks=num_blocks,
                kv_tokens=(num_blocks - 1) * min(kv.block_sizes) // len(kv.block_sizes),
                max_concurrency=(num_blocks - 1) / per_request,
            ),
            device=f"{platform.name}:{','.join(map(str, spec.device_indexes))}",
            notes=(*self.ops.notes, *prepared),
        )

    def _shard(self, limits: StepLimits, model: ModelConfig) -> Shard:
        spec = self.spec
        group = GroupSpec(
            ranks=tuple(range(spec.world_size)),
            rank=spec.rank,
            purpose="tp",
            max_message_bytes=4 * limits.max_num_tokens * max(model.hidden_size, model.vocab_size),
            store=spec.store,
            timeout_s=spec.config.timeout_s,
        )
        return Shard(rank=spec.rank, size=spec.world_size, communicator=self.platform.communicator(group))

    # -- steps --------------------------------------------------------------------------------------------

    def launch(self, decision: StepDecision) -> None:
        try:
            self.runner.launch(decision)
        except Exception as error:
            self._explained(error)
            raise

    def sample(self, late: LateInputs) -> RunnerResult:
        try:
            return self.runner.sample(late)
        except Exception as error:
            self._explained(error)
            raise

    def _explained(self, error: Exception) -> None:
        fault = self.platform.explain(error)
        if fault is not None:
            raise fault from error

    def close(self, reason: str) -> None:
        self.program.close()
        self.platform.close(reason)


def step_limits(config: EngineConfig, model: ModelConfig, platform: Platform, kv: KVPlan) -> StepLimits:
    """The configuration's limits within the device's."""
    rules = platform.step_rules
    length = config.max_model_len or model.max_positions
    rows = min(config.max_num_seqs, rules.max_rows or config.max_num_seqs)
    return StepLimits(
        max_num_tokens=min(config.max_num_batched_tokens, rules.max_tokens or config.max_num_batched_tokens),
        max_num_reqs=rows,
        max_model_len=length,
        max_slots=config.max_num_seqs,
        max_pages=tuple(cdiv(length, size) for size in kv.block_sizes),
    )


def kv_budget(platform: Platform, config: EngineConfig, activations: PeakMemory, graphs: int) -> int | None:
    """Bytes for the KV cache; None when nobody can say."""
    own = platform.kv_budget(activations)
    if own is not None:
        return own
    memory = platform.memory(platform.context.device_indexes[0])
    if memory.free is None or memory.total is None:
        return None
    in_use = memory.total - memory.free
    return int(memory.total * config.memory_fraction) - in_use - activations.nbytes - graphs


def measure_maximal_step(
    platform: Platform, program: StepProgram, batch: InputBatch, kv: KVPlan, limits: StepLimits
) -> PeakMemory:
    """The peak of a step that fills the token budget with whole prompts, on a KV pool just large enough."""
    lengths = maximal_rows(limits)
    per_request = [[cdiv(length, size) for size in kv.block_sizes] for length in lengths]
    state = program.initial_state(1 + sum(map(sum, per_request)))
    runner = ModelRunner(program, batch, state)
    next_block, rows = 1, []
    for slot, (length, counts) in enumerate(zip(lengths, per_request, strict=True)):
        tables = []
        for count in counts:
            tables.append(list(range(next_block, next_block + count)))
            next_block += count
        rows.append(_profile_row(slot, length, tables))
    decision = StepDecision(
        step_id=0,
        slots=np.arange(len(rows), dtype=np.int32).tobytes(),
        num_tokens=np.array(lengths, dtype=np.int32).tobytes(),
        new_rows=rows,
        new_blocks=b"",
        finished_slots=[],
        copies=[],
        zeros=[],
    )

    def run() -> None:
        runner.launch(decision)
        runner.sample(LateInputs(0, {})).fetch()

    return platform.measure(run)


def maximal_rows(limits: StepLimits) -> list[int]:
    """Prompt lengths that fill the token budget, as long as the model allows."""
    left, lengths = limits.max_num_tokens, list[int]()
    while left and len(lengths) < limits.max_num_reqs:
        lengths.append(min(left, limits.max_model_len - 1))
        left -= lengths[-1]
    return lengths


def _profile_row(slot: int, length: int, tables: list[list[int]]) -> NewRow:
    return NewRow(
        slot=slot,
        token_ids=np.zeros(length, dtype=np.int32).tobytes(),
        num_prompt=length,
        num_computed=0,
        block_ids=tables,
        temperature=1.0,
        top_k=0,
        top_p=0.9,
        min_p=0.0,
        seed=0,
        sample_index=0,
        logprobs=0,
    )
