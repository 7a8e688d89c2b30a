"""A worker: one rank's platform, model, KV cache and runner, from a spec to the last step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import msgspec

from anychip.config import EngineConfig, WorkerSpec
from anychip.errors import DeviceUnavailable
from anychip.messages import KVCacheConfig, LateInputs, MemoryPlan, StepDecision, WorkerReady
from anychip.model_config import ModelConfig, load_model_config
from anychip.ops.table import resolve_ops
from anychip.plugin_api import (
    AttentionBackend,
    AttentionSpec,
    CompileReport,
    GroupSpec,
    KVPlan,
    PeakMemory,
    ProbeResult,
    Shard,
    StepLimits,
)
from anychip.registry.plugins import load_plugins
from anychip.worker.input_batch import InputBatch
from anychip.worker.kv_plan import count_blocks, kv_cache_config, plan_kv
from anychip.worker.model_runner import ModelRunner, RunnerResult
from anychip.worker.model_source import CheckpointSource
from anychip.worker.open_platform import open_platform
from anychip.worker.sizing import (
    affordable_graphs,
    kv_budget,
    maximal_shape,
    measure_maximal_step,
    memory_plan,
    step_limits,
)
from anychip.worker.staging import StagingRing
from anychip.worker.torch_program import TorchStepProgram


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
            manifest,
            device_indexes=spec.device_indexes,
            options=options,
            probe=msgspec.convert(spec.probe, ProbeResult),
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
        platform = self.platform
        source = CheckpointSource(config=config, model=model, platform=platform, ops=self.ops, contributed=contributed)
        size = len(self.spec.device_indexes) if per_host else self.spec.world_size
        backend_for: Callable[[AttentionSpec], AttentionBackend] = cache(platform.attention)
        kv = plan_kv(source.attention_specs(size), backend_for, config.block_size)
        limits = step_limits(config, model, platform, kv)
        policy = platform.shape_policy(limits)
        keys = affordable_graphs(platform, policy)

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

        program = platform.step_program(source, kv, limits)
        if program is not None:
            activations = PeakMemory(nbytes=program.memory(maximal_shape(policy, limits)), exact=True)
        else:
            program = self._torch_program(source, kv, limits, model)
            activations = measure_maximal_step(platform, program, new_batch(), kv, limits)
        self.program = program
        graphs = platform.graph_capture().reserve(keys)
        num_blocks = count_blocks(
            config,
            kv,
            budget=kv_budget(platform, config, activations, graphs),
            max_model_len=limits.max_model_len,
            max_slots=platform.capabilities.max_slots,
        )
        state = program.initial_state(num_blocks)
        report = program.warm_up(keys)
        self.runner = ModelRunner(program, new_batch(), state)
        memory = memory_plan(kv, num_blocks, limits, source.held_bytes, activations, graphs)
        self.ready = self._report(kv_cache_config(kv, num_blocks), memory, report, source)

    def _report(
        self, kv: KVCacheConfig, memory: MemoryPlan, report: CompileReport, source: CheckpointSource
    ) -> WorkerReady:
        prepared = f"{report.num_programs} programs prepared in {report.seconds:.2f} s"
        return WorkerReady(
            kv=kv,
            rules=self.platform.step_rules.for_device(self.platform.capabilities),
            memory=memory,
            device=f"{self.platform.name}:{','.join(map(str, self.spec.device_indexes))}",
            notes=(*self.ops.notes, str(source.progress), *([prepared] if report.num_programs else [])),
        )

    def _torch_program(
        self, source: CheckpointSource, kv: KVPlan, limits: StepLimits, model: ModelConfig
    ) -> TorchStepProgram:
        shard = self._shard(limits, model)
        return TorchStepProgram(
            platform=self.platform,
            model=source.build(shard),
            ops=self.ops.ops,
            kv=kv,
            limits=limits,
            communicators=[shard.communicator],
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
