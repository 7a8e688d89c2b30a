"""Platform: one opened device family. Made once per process, passed down, never global.

Its factories answer with the reference implementation unless overridden, so a platform that names a torch device
and nothing else already runs every model; a vendor then replaces kernel by kernel.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, assert_never

from anychip.errors import DeviceFault, Unsupported
from anychip.plugin_api.attention import AttentionBackend, AttentionSpec
from anychip.plugin_api.cache import CacheBackend
from anychip.plugin_api.cache_plan import KVPlan
from anychip.plugin_api.cache_specs import CacheSpec
from anychip.plugin_api.capabilities import Capabilities, StepLimits, StepRules
from anychip.plugin_api.communicator import Communicator, GroupSpec
from anychip.plugin_api.encoder import EncoderBackend, EncoderSpec
from anychip.plugin_api.event import Event
from anychip.plugin_api.graph import GraphCapture, RegionCompiler, ShapePolicy
from anychip.plugin_api.latent import LatentBackend, LatentSpec
from anychip.plugin_api.linear import LinearKernel, LinearSpec
from anychip.plugin_api.manifest import PlatformManifest, PluginOptions, ProbeResult
from anychip.plugin_api.memory import MemoryInfo, PeakMemory, WeightsKey
from anychip.plugin_api.mesh import MeshShape
from anychip.plugin_api.moe import FusedMoE, MoESpec
from anychip.plugin_api.profile import DeviceProfile
from anychip.plugin_api.refusals import undeclared
from anychip.plugin_api.state import StateBackend, StateSpec
from anychip.plugin_api.step import ModelSource, StepProgram

if TYPE_CHECKING:
    from torch import Tensor, UntypedStorage


class ReferenceKernels(Protocol):
    """Core's pure-PyTorch implementations (anychip.ops.reference), handed to the platform when it is opened so
    that this package needs no torch."""

    def attention(self, spec: AttentionSpec) -> AttentionBackend: ...
    def latent(self, spec: LatentSpec) -> LatentBackend: ...
    def state(self, spec: StateSpec) -> StateBackend: ...
    def encoder(self, spec: EncoderSpec) -> EncoderBackend: ...
    def linear(self, spec: LinearSpec, platform: Platform) -> LinearKernel: ...
    def moe(self, spec: MoESpec, platform: Platform) -> FusedMoE: ...
    def empty(self, shape: Sequence[int], dtype: str, device: str, *, pinned: bool = False) -> Tensor: ...
    def seed(self, n: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformContext:
    """What a platform is opened with. `device_indexes` are those that this process drives."""

    manifest: PlatformManifest
    device_indexes: tuple[int, ...]
    options: PluginOptions
    probe: ProbeResult
    reference: ReferenceKernels


class Platform:
    """Subclasses set `capabilities` and `step_rules` (as attributes or properties) and override what they do
    better than the reference."""

    capabilities: Capabilities = Capabilities()
    step_rules: StepRules = StepRules()
    profiled_tokens: int | None = None
    """Tokens of the step that is measured at the start, for devices on which a maximal one takes seconds: what it holds
    is scaled up. None: a maximal one."""

    def __init__(self, context: PlatformContext) -> None:
        self.context = context
        self.reference = context.reference

    @property
    def name(self) -> str:
        return self.context.manifest.name

    # -- devices and streams ------------------------------------------------------------------------------

    def device(self, index: int) -> str:
        """torch's name of a device."""
        return "cpu"

    @property
    def default_device(self) -> str:
        """The first device that this process drives."""
        return self.device(self.context.device_indexes[0])

    @property
    def weights_device(self) -> str:
        """Where weights are loaded. A step program that moves them to its devices itself may name the host."""
        return self.default_device

    @property
    def device_mesh(self) -> MeshShape:
        """The devices that this process drives, as a mesh: its rank i is the context's device_indexes[i]. A platform
        says it once it is open, as runtimes of one vendor differ. Where it is one device, ranks are processes."""
        return MeshShape(tp=len(self.context.device_indexes))

    def seed(self, n: int) -> None:
        """Seeds torch's generators; sampling does not use them."""
        self.reference.seed(n)

    def synchronize(self) -> None:
        """Waits for all work on this process's devices."""

    def event(self) -> Event:
        """Marks the work issued so far; on a device without streams it has already happened."""
        return Event()

    # -- memory -------------------------------------------------------------------------------------------

    def memory(self, device: int) -> MemoryInfo:
        return MemoryInfo(free=None, total=None)

    def kv_budget(self, profile: PeakMemory) -> int | None:
        """Bytes for the KV cache where memory() cannot say; None: the configuration must."""
        return None

    def allocate(self, nbytes: int, tag: str) -> Tensor:
        """uint8 [nbytes] on the default device. Tags ("weights", "kv", "graphs") are what sleep and wake name."""
        return self.reference.empty((nbytes,), "uint8", self.default_device)

    def empty(self, shape: Sequence[int], dtype: str, tag: str) -> Tensor:
        """An uninitialised tensor on the default device, or on weights_device where the tag is "weights"."""
        return self.reference.empty(shape, dtype, self.weights_device if tag == "weights" else self.default_device)

    def pinned(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] host memory that copies to the device without staging, where the device has such."""
        return self.reference.empty((nbytes,), "uint8", "cpu")

    def measure(self, fn: Callable[[], Any]) -> PeakMemory:
        """Runs fn and reports the most it held. The default cannot see and says 0, inexactly."""
        fn()
        return PeakMemory(nbytes=0, exact=False)

    def keep_weights(self, key: WeightsKey, storages: Sequence[UntypedStorage]) -> None:
        """Offers all of a model's weights, as `load` left them and before `finish`, for later starts. The default keeps
        nothing."""

    def restore_weights(self, key: WeightsKey, storages: Sequence[UntypedStorage]) -> bool:
        """Fills the storages with what was kept of the same model. False: that cannot be, they are as they were, and
        the checkpoint is read."""
        return False

    def sleep(self, tags: Sequence[str]) -> None:
        """Gives memory back, by tag; contents may be lost."""

    def wake(self, tags: Sequence[str]) -> None:
        """Takes memory again, at the same addresses."""

    # -- kernels: factories raise Unsupported with every reason, hot calls never do ------------------------

    def check(self, spec: CacheSpec | LinearSpec | MoESpec) -> None:
        """Raises Unsupported for what the capabilities do not declare. Factories that are overridden call it first."""
        if reasons := undeclared(spec, self.capabilities):
            raise Unsupported(self.name, [f"does not serve {reason}" for reason in reasons])

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        self.check(spec)
        return self.reference.attention(spec)

    def latent(self, spec: LatentSpec) -> LatentBackend:
        self.check(spec)
        return self.reference.latent(spec)

    def state(self, spec: StateSpec) -> StateBackend:
        self.check(spec)
        return self.reference.state(spec)

    def encoder(self, spec: EncoderSpec) -> EncoderBackend:
        self.check(spec)
        return self.reference.encoder(spec)

    def cache_backend(self, spec: CacheSpec) -> CacheBackend:
        """The backend of any kind of layer, from the factory of its kind."""
        match spec:
            case AttentionSpec():
                return self.attention(spec)
            case LatentSpec():
                return self.latent(spec)
            case StateSpec():
                return self.state(spec)
            case EncoderSpec():
                return self.encoder(spec)
            case _:
                assert_never(spec)

    def moe(self, spec: MoESpec) -> FusedMoE:
        self.check(spec)
        return self.reference.moe(spec, self)

    def linear(self, spec: LinearSpec) -> LinearKernel:
        self.check(spec)
        return self.reference.linear(spec, self)

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        """Overrides by op name, each marked with @op_override. Checked when the platform is opened."""
        return {}

    def communicator(self, group: GroupSpec) -> Communicator:
        """Collectives between processes along one axis of their mesh, which `group.purpose` names. Raises Unsupported
        for an axis that the device does not serve; groups of one rank are not asked for."""
        return Communicator(group)

    # -- steps --------------------------------------------------------------------------------------------

    def graph_capture(self) -> GraphCapture:
        return GraphCapture()

    def shape_policy(self, limits: StepLimits) -> ShapePolicy:
        return ShapePolicy()

    def compiler(self) -> RegionCompiler | None:
        """Makes ops that have no override out of the reference; None: the reference runs as it is."""
        return None

    def step_program(self, model: ModelSource, kv: KVPlan, limits: StepLimits) -> StepProgram | None:
        """The step seam. None: core runs the model through the factories above."""
        return None

    # -- life ---------------------------------------------------------------------------------------------

    @property
    def notes(self) -> Sequence[str]:
        """What the device lacks, and what serves instead: doctor shows it beside the ops."""
        return ()

    def profiler(self) -> contextlib.AbstractContextManager[DeviceProfile]:
        """Collects what this process's devices do within the context. The default sees nothing."""
        return contextlib.nullcontext(DeviceProfile())

    def health(self, deadline_s: float) -> None:
        """Raises DeviceFault when the device does not answer within the deadline."""

    def explain(self, exc: BaseException) -> DeviceFault | None:
        """A vendor's exception in anychip's words; None: not the device's."""
        return None

    def close(self, reason: str) -> None:
        """Called by the process that owns the devices, whatever ended it."""
        gc.collect()
