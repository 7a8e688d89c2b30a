"""fake-faulty: reference kernels spelled out, all that they can do declared, and one part replaced by a fault."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from anychip.errors import ConfigError
from anychip.ops.reference import ReferenceEncoder, ReferenceLatent, SparseLatent, dense_part
from anychip.plugin_api import (
    RECURRENCES,
    Activation,
    AttentionBackend,
    AttentionSpec,
    Capabilities,
    Communicator,
    EncoderBackend,
    EncoderSpec,
    FusedMoE,
    GraphCapture,
    GroupSpec,
    KVPlan,
    LatentBackend,
    LatentSpec,
    LinearKernel,
    LinearSpec,
    ModelSource,
    MoESpec,
    Platform,
    PlatformContext,
    ShapePolicy,
    StateBackend,
    StateSpec,
    StepLimits,
    StepProgram,
    op_override,
)
from anychip_conformance.fakes.hostlen import HostlenAttention, HostlenPlatform
from anychip_conformance.fakes.mesh import MeshPlatform
from anychip_conformance.fakes.spmd import SpmdStepProgram
from anychip_conformance.fakes.static import StaticPlatform, StaticStepProgram
from anychip_conformance.faulty import FaultyOptions
from anychip_conformance.faulty.plain import InvariantMoE, PlainAttention, PlainLinear, plain_communicator
from anychip_conformance.faulty.recurrences import PlainRecurrence
from anychip_conformance.faulty.registry import Fault, all_faults, find
from anychip_conformance.faulty.states import PlainStates


def planted(context: PlatformContext) -> Fault | None:
    """The fault that the options name. Raises ConfigError for one that does not exist."""
    options = context.options
    assert isinstance(options, FaultyOptions)
    if not options.fault:
        return None
    found = find(options.fault)
    if found is None:
        raise ConfigError(f"--device-opt fault={options.fault}: there are {', '.join(all_faults())}")
    return found


class FaultyPlatform(Platform):
    """The torch seam."""

    capabilities = Capabilities(
        dtypes=frozenset({"float32", "bfloat16"}),
        collectives="runtime",
        batch_invariant=True,
        attention_lse=True,
        mla=True,
        sparse_latent=True,
        recurrences=frozenset(RECURRENCES),
        encoders=True,
        epilogues=frozenset(get_args(Activation)),
        lora=True,
    )

    def __init__(self, context: PlatformContext) -> None:
        super().__init__(context)
        self._fault = planted(context)

    def _part(self, part: str, honest: Any) -> Any:
        return self._fault.replacement if self._fault is not None and self._fault.part == part else honest

    def kv_budget(self, profile: object) -> int:
        return 2**26

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        self.check(spec)
        backend: AttentionBackend = self._part("attention", PlainAttention)(spec)
        return backend

    def latent(self, spec: LatentSpec) -> LatentBackend:
        self.check(spec)
        rows: LatentBackend = self._part("latent", ReferenceLatent)(dense_part(spec))
        if not spec.index_dim:
            return rows
        sparse: LatentBackend = self._part("sparse", SparseLatent)(spec, rows)
        return sparse

    def state(self, spec: StateSpec) -> StateBackend:
        self.check(spec)
        honest = self._part("state", PlainStates) if spec.recurrence == "gated_sum" else PlainRecurrence
        backend: StateBackend = self._part("recurrence", honest)(spec)
        return backend

    def encoder(self, spec: EncoderSpec) -> EncoderBackend:
        self.check(spec)
        backend: EncoderBackend = self._part("encoder", ReferenceEncoder)(spec)
        return backend

    def linear(self, spec: LinearSpec) -> LinearKernel:
        self.check(spec)
        if spec.scheme is not None and not (self._fault and self._fault.part == "linear"):
            return self.reference.linear(spec, self)
        kernel: LinearKernel = self._part("linear", PlainLinear)(spec, self)
        return kernel

    def moe(self, spec: MoESpec) -> FusedMoE:
        self.check(spec)
        kernel: FusedMoE = self._part("moe", InvariantMoE)(spec, self)
        return kernel

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        fault = self._fault
        if fault is None or not fault.op:
            return {}
        override = fault.replacement(self) if fault.part == "op of a rank" else fault.replacement
        return {fault.op: op_override(fault.op, version=1)(override)}

    def communicator(self, group: GroupSpec) -> Communicator:
        return plain_communicator(group, self._part("communicator", None))

    def shape_policy(self, limits: StepLimits) -> ShapePolicy:
        policy: ShapePolicy = self._part("shapes", ShapePolicy)()
        return policy


class FaultyGraphsPlatform(HostlenPlatform):
    """Faults of graphs and of plans that are rewritten between replays."""

    def __init__(self, context: PlatformContext) -> None:
        super().__init__(context)
        self._fault = planted(context)
        if self._fault is not None and self._fault.part == "graphs":
            self._graphs = self._fault.replacement()

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        self.check(spec)
        faulty = self._fault is not None and self._fault.part == "hostlen attention"
        cls = self._fault.replacement if faulty and self._fault else HostlenAttention
        backend: AttentionBackend = cls(spec, self._graphs)
        return backend

    def graph_capture(self) -> GraphCapture:
        return self._graphs


class FaultyStepPlatform(StaticPlatform):
    """Faults of step programs."""

    def __init__(self, context: PlatformContext) -> None:
        super().__init__(context)
        self._fault = planted(context)

    def step_program(self, model: ModelSource, kv: KVPlan, limits: StepLimits) -> StepProgram:
        faulty = self._fault is not None and self._fault.part == "step"
        cls = self._fault.replacement if faulty and self._fault else StaticStepProgram
        program: StepProgram = cls(model, kv, limits)
        return program


class FaultyMeshPlatform(MeshPlatform):
    """Faults of programs that divide a model over a mesh of devices."""

    def __init__(self, context: PlatformContext) -> None:
        super().__init__(context)
        self._fault = planted(context)

    def step_program(self, model: ModelSource, kv: KVPlan, limits: StepLimits) -> StepProgram:
        faulty = self._fault is not None and self._fault.part == "mesh"
        cls = self._fault.replacement if faulty and self._fault else SpmdStepProgram
        program: StepProgram = cls(model, kv, limits, self.device_mesh)
        return program
