"""A worker: one rank's platform, model, KV cache and runner, from a spec to the last step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import fields
from typing import Any, cast

from anychip.errors import InvalidOverride, Unsupported
from anychip.layers.stage import WHOLE
from anychip.messages import DropAdapter, LoadAdapter
from anychip.model_config import ModelConfig, load_model_config
from anychip.models.head_parts import FollowingHead, HeadFamily, TargetParts
from anychip.models.medusa import MedusaHeads
from anychip.ops.table import resolve_platform_ops
from anychip.plugin_api import (
    Capabilities,
    CompileReport,
    Mesh,
    PeakMemory,
    StepLimits,
    StepModel,
    StepProgram,
)
from anychip.plugin_api.ops import COMPOSITE_OPS
from anychip.process_specs import WorkerSpec
from anychip.registry.plugins import Plugins, load_plugins
from anychip.step_messages import LateInputs, StepDecision
from anychip.worker.adapters import AdapterStore, Report, slot_bytes
from anychip.worker.draft_preparation import prepare_all
from anychip.worker.draft_runner import DraftRunner
from anychip.worker.expert_balancer import ExpertBalancer
from anychip.worker.head_runner import HeadRunner
from anychip.worker.kv_plan import fresh_state, kv_cache_config
from anychip.worker.largest_steps import step_memory
from anychip.worker.medusa_runner import MedusaRunner
from anychip.worker.memory import DeviceUse, count_blocks, measure_largest_step, memory_plan
from anychip.worker.model_runner import ModelRunner
from anychip.worker.model_source import CheckpointSource
from anychip.worker.open_platform import explained, open_for
from anychip.worker.preparation import Preparation
from anychip.worker.step_costs import measure_steps
from anychip.worker.torch_program import TorchStepProgram
from anychip.worker.worker_result import WorkerResult
from anychip.worker_report import KVCacheConfig, MemoryPlan, WorkerReady


class Worker:
    """Ready for steps once constructed. Raises what kept it from that. `got_on` hears what the start does, whenever a
    part of it is done."""

    def __init__(self, spec: WorkerSpec, got_on: Callable[[str], None] = lambda doing: None) -> None:
        self.spec = spec
        self.drafter: DraftRunner | HeadRunner | MedusaRunner | None = None
        self.balancer: ExpertBalancer | None = None
        self._got_on = got_on
        self._launched: StepDecision | None = None
        self._stage = WHOLE
        self._step_costs = self._draft_costs = tuple[tuple[int, float], ...]()
        config = spec.config
        model = load_model_config(config.model)
        plugins = load_plugins()
        self.platform = open_for(spec, plugins)
        try:
            with explained(self.platform):
                self.platform.seed(config.seed)
                self.ops = resolve_platform_ops(self.platform, require_native=config.require_native)
                self._start(model, plugins)
        except BaseException:
            with suppress(Exception):  # what kept it from starting is the error to report
                self.platform.close("start failed")
            raise

    def _start(self, model: ModelConfig, plugins: Plugins) -> None:
        prepared = prepare_all(self.spec, model, self.platform, self.ops, plugins.models, plugins.quant_formats)
        source, limits = prepared.source, prepared.limits
        source.got_on, self._stage = self._got_on, source.stage
        program, drafting, medusa = self._step_program(prepared), None, None
        if program is not None:
            needed = step_memory(program, prepared.policy, self.platform.step_rules, limits)
            activations = PeakMemory(nbytes=needed, exact=True)
            pending = prepared.kept_bytes + slot_bytes(program.adapter_sites, limits)
        else:
            mesh = prepared.mesh(self.spec, self.platform.communicator)
            program = self._torch_program(prepared, mesh)
            activations = measure_largest_step(prepared, program)
            pending = 0
            self.balancer = ExpertBalancer.of(program.model, config=self.spec.config)
            if prepared.draft is not None:
                _lend(program.model, prepared.draft.source)
                drafting = self._torch_program(prepared.draft, mesh)
                passes = measure_largest_step(prepared.draft, drafting)  # never while the target's step runs
                activations = max(activations, passes, key=lambda peak: peak.nbytes)
            if prepared.medusa is not None:
                _lend(program.model, prepared.medusa)
                medusa = MedusaRunner(cast(MedusaHeads, prepared.medusa.build(mesh)))
        self.program = program
        self._got_on("the KV cache is sized")
        graphs = prepared.graph_bytes
        weights = source.held_bytes + slot_bytes(program.adapter_sites, limits)
        if prepared.drafts is not None:
            weights += prepared.drafts.held_bytes
        use = DeviceUse.beside(prepared, weights + prepared.kept_bytes)
        blocks = count_blocks(prepared, activations, graphs, pending=pending)
        state = fresh_state(program, prepared.kv, blocks, prepared.num_states)
        self._got_on(f"{len(prepared.keys)} shapes are prepared")
        report = program.warm_up(prepared.keys)
        prepared = prepared.unless_refused(report)
        self.runner = ModelRunner(program, prepared.new_batch(), state, prepared.vector_head())
        self.runner.passes_on = not self._stage.is_last
        if isinstance(program, TorchStepProgram):
            self.runner.await_ids = program.await_ids
            self.runner.join_others = program.join
        rank, elsewhere = limits.max_adapter_rank, source.held_elsewhere
        self.adapters = AdapterStore(program.adapter_sites, rank, source.checkpoint, elsewhere)
        self.runner.adapter_entries = self.adapters.entries
        if prepared.draft is not None and drafting is not None:
            self._start_drafting(prepared.draft, drafting, blocks)
        if medusa is not None:
            self.drafter, self.runner.read_taps = medusa, medusa.read
            state = self.platform.empty((prepared.model.hidden_size,), source.dtype, "features").zero_()
            self._draft_costs = medusa.measured(state, limits.max_num_reqs)
        if limits.max_drafts:
            # Draws by chance take longer than greedy ones, and drafts must pay in either case.
            self._step_costs = measure_steps(self.runner, limits, prepared.kv, blocks, temperature=1.0)
        notes = (*prepared.notes, *source.notes, *source.checkpoint.notes, str(source.progress))
        if prepared.drafts is not None:
            notes += (f"what drafts: {prepared.drafts.progress}",)
        memory = memory_plan(prepared, blocks, weights=weights, activations=activations, graphs=graphs, use=use)
        kv = kv_cache_config(prepared.kv, blocks, prepared.num_states)
        self.ready = self._report(prepared, kv, memory, report, notes)

    def _step_program(self, prepared: Preparation) -> StepProgram | None:
        """None: core runs the model. Raises InvalidOverride where the manifest says otherwise."""
        manifest = self.platform.context.manifest
        program = self.platform.step_program(prepared.source, prepared.kv, prepared.limits)
        if (program is not None) != (manifest.seam == "step"):
            given = "none" if program is None else type(program).__name__
            raise InvalidOverride(
                f"{manifest.package}: the manifest says seam={manifest.seam!r}, and Platform.step_program gave "
                f'{given}; a platform that has one says seam="step", and no other does'
            )
        if program is not None:
            self._check_features(program, prepared.limits)
        return program

    @staticmethod
    def _check_features(program: StepProgram, limits: StepLimits) -> None:
        """Raises Unsupported where the configuration asks for what the program leaves to StepProgram's defaults."""
        asked = {
            "taps": bool(limits.taps), "embed": limits.max_embeddings > 0, "adapt": limits.max_adapters > 0,
        }  # fmt: skip
        missing = [
            f"{name} is not implemented"
            for name, wanted in asked.items()
            if wanted and getattr(type(program), name) is getattr(StepProgram, name)
        ]
        if missing:
            raise Unsupported(type(program).__name__, missing)

    def _report(
        self,
        prepared: Preparation,
        kv: KVCacheConfig,
        memory: MemoryPlan,
        report: CompileReport,
        notes: tuple[str, ...],
    ) -> WorkerReady:
        programs = f"{report.num_programs} programs prepared in {report.seconds:.2f} s"
        if report.refused:
            notes = (*notes, f"steps run without graphs: {report.refused}")
        return WorkerReady(
            kv=kv,
            rules=prepared.rules,
            memory=memory,
            device=f"{self.platform.name}:{','.join(map(str, self.spec.device_indexes))}",
            notes=(*self.ops.notes, *notes, *([programs] if report.num_programs else [])),
            kernels=self._kernels(),
            capabilities=_declared(self.platform.capabilities),
            step_costs=self._step_costs,
            draft_costs=self._draft_costs,
        )

    def _kernels(self) -> dict[str, str]:
        """What serves each op; a composite one without an override is made of the single ones."""
        served = {
            name: "the single ops that it is made of" if source == "reference" and name in COMPOSITE_OPS else source
            for name, source in self.ops.served_by.items()
        }
        model = getattr(self.program, "model", None)
        if model is not None:
            attention = sorted(
                {f"{type(backend).__module__}.{type(backend).__qualname__}" for backend in model.attention}
            )
            served["attention"] = f"{self.platform.name} ({', '.join(attention)})"
        return {name: f"{source}: no override" if source == "reference" else source for name, source in served.items()}

    def _torch_program(self, prepared: Preparation, mesh: Mesh) -> TorchStepProgram:
        """Of the model, of the draft model, or of the head."""
        model = prepared.source.build(mesh)
        features = None
        if prepared.head is not None:
            shape = (prepared.limits.max_embeddings, model.hidden_size)
            features = self.platform.empty(shape, prepared.source.dtype, "features").zero_()
        return TorchStepProgram(
            platform=self.platform,
            model=model,
            ops=self.ops.ops,
            kv=prepared.kv,
            limits=prepared.limits,
            communicators=mesh.opened,
            pieces=prepared.pieces,
            edits=prepared.lies_under is None and prepared.edits,
            embeddings=features,
            returning=prepared.returning_ids(mesh),
        )

    def _start_drafting(self, prepared: Preparation, program: TorchStepProgram, num_blocks: int) -> None:
        """The draft model's preparation and program, and the blocks of the pool that it shares."""
        state = fresh_state(program, prepared.kv, num_blocks, 0)
        self._got_on(f"{len(prepared.keys)} shapes of the draft model are prepared")
        prepared = prepared.unless_refused(program.warm_up(prepared.keys))
        runner = ModelRunner(program, prepared.new_batch(), state)
        self._draft_costs = measure_steps(runner, prepared.limits, prepared.kv, num_blocks, temperature=0.0)
        assert prepared.lies_under is not None, "a draft model lies under a group"
        shared: dict[str, Any] = {
            "group": prepared.lies_under,
            "num_groups": len(prepared.kv.specs),
            "limits": prepared.limits,
            "depth": prepared.config.max_in_flight,
        }
        if isinstance(program.model, FollowingHead) and program.embeddings is not None:
            head = HeadRunner(runner, program.model.join, program.embeddings, **shared)
            self.drafter, self.runner.read_taps = head, head.read
            return
        self.drafter = DraftRunner(
            runner,
            block_size=prepared.kv.block_sizes[0],
            num_blocks=num_blocks,
            rules=self.platform.step_rules,
            max_drafts=prepared.config.max_drafts,
            max_positions=prepared.source.model.max_positions,
            **shared,
        )

    # -- steps --------------------------------------------------------------------------------------------

    def launch(self, decision: StepDecision) -> None:
        self._launched = decision
        with self._explained():
            if self.balancer is not None:
                self.balancer.step()
            self.runner.launch(decision)

    def sample(self, late: LateInputs) -> WorkerResult:
        with self._explained():
            result = self.runner.sample(late)
            experts = None if self.balancer is None else self.balancer.news()
            if self.drafter is None or self._launched is None:
                return WorkerResult(self._explained, result, experts=experts)
            return WorkerResult(self._explained, result, self.drafter.sampled(self._launched, result), experts)

    def _explained(self) -> AbstractContextManager[None]:
        """Around what a step does on the device."""
        return explained(self.platform, others_wait=self._stage.count > 1 or self.spec.config.lanes_meet)

    # -- adapters -----------------------------------------------------------------------------------------

    def load_adapter(self, message: LoadAdapter, report: Report) -> None:
        """Reads an adapter beside the steps."""
        self.adapters.load(message, report)

    def drop_adapter(self, message: DropAdapter) -> None:
        self.adapters.drop(message.digest)

    def close(self, reason: str) -> None:
        self.adapters.close()
        with explained(self.platform):
            try:
                self.program.close()
            finally:
                self.platform.close(reason)


def _lend(target: StepModel, heads: CheckpointSource) -> None:
    """Heads are built after the model whose parts they borrow. A draft model borrows none."""
    if isinstance(heads.family, HeadFamily):
        heads.family.target = TargetParts.of(target)


def _declared(capabilities: Capabilities) -> dict[str, str]:
    return {field.name: _shown(getattr(capabilities, field.name)) for field in fields(capabilities)}


def _shown(value: object) -> str:
    """A capability as people read it."""
    if isinstance(value, frozenset | tuple):
        return ", ".join(sorted(map(str, value))) or "none"
    return "any" if value is None else str(getattr(value, "name", value)).lower()
