"""What a package says about itself before anything of it is loaded: dotted names, versions, requirements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from anychip.errors import ConfigError

if TYPE_CHECKING:
    from anychip.config import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """One device as the probe found it. `total_memory` in bytes, None where the runtime does not say.

    `backing` says what runs the work: the accelerator itself; the host's own processor, which is the device; the
    vendor's CPU runtime in place of it; or a simulation. Scorecards carry it as their evidence.

    `reach` is for simulations too slow for the sizes of real models: the largest size of any dimension at which the
    conformance suite judges them. Scorecards show it; what is no simulation has none.
    """

    index: int
    name: str
    total_memory: int | None = None
    detail: str = ""
    backing: Literal["hardware", "host", "cpu_runtime", "simulated"] = "hardware"
    reach: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """Devices that can be used now; or, with none, the reason and what to do. A probe never raises."""

    devices: tuple[DeviceInfo, ...] = ()
    reason: str = ""
    remedy: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the driver, the toolkit, the runtime: whatever `doctor` should show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """Something a platform needs: a Python package with a version range, or a thing that `probe` looks for."""

    kind: Literal["package", "driver", "toolkit", "firmware", "tool"]
    name: str
    range: str = ""
    """A PEP 440 specifier such as ">=2.9,<2.14"; empty: any version."""
    probe: str = ""
    """Dotted "module:function" returning a version string or None; empty: the installed package's version."""
    remedy: str = ""
    optional: bool = False


Topology = Literal["process_per_device", "process_per_host"]
"""How many devices one process drives: one, or all of them (SPMD)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A platform's answer to a configuration: fills unset fields, refuses, explains. Never overrides the user."""

    fill: Mapping[str, Any] = field(default_factory=dict)
    refuse: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    topology: Topology | None = None
    """That of the runtime which will be opened, where a vendor has several; None: the manifest's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a worker runs: its rank among the workers of its machine, of which there are `world_size`, and the device
    indexes that its process drives."""

    rank: int
    world_size: int
    device_indexes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PluginOptions:
    """Base of a platform's --device-opt settings: a frozen dataclass whose fields are str, int, float or bool.

    A field's metadata may hold {"help": "..."}, which `anychip devices` prints.
    """

    @classmethod
    def parse(cls, plugin: str, given: Mapping[str, str]) -> PluginOptions:
        """Raises ConfigError for an unknown key or a value of the wrong type."""
        hints = get_type_hints(cls)
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ConfigError(
                f"--device-opt {unknown[0]}: {plugin} has no such option; it has {', '.join(sorted(known)) or 'none'}"
            )
        try:
            return cls(**{key: _PARSERS[hints[key]](value) for key, value in given.items()})
        except ValueError as error:
            raise ConfigError(f"--device-opt for {plugin}: {error}") from error


def _parse_bool(text: str) -> bool:
    if text.lower() in {"1", "true", "yes", "on"}:
        return True
    if text.lower() in {"0", "false", "no", "off"}:
        return False
    raise ValueError(f"{text!r} is not true or false")


_PARSERS: dict[type, Callable[[str], Any]] = {str: str, int: int, float: float, bool: _parse_bool}


def accept(config: EngineConfig, probe: ProbeResult) -> Decision:
    """The default negotiation: nothing to fill, nothing to refuse."""
    return Decision()


def no_environment(config: EngineConfig, placement: Placement) -> Mapping[str, str]:
    """The default worker environment: nothing added."""
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformManifest:
    """A device family. Everything named by a dotted string is imported only when it is needed.

    `seam` "torch": core runs the model and calls the platform's kernels. "step": the platform's StepProgram
    runs whole compiled steps. `topology` is what is known before anything is asked: the Decision of `negotiate` may say
    otherwise, and Platform.device_mesh says what the opened runtime makes of its devices. `auto_select` False keeps a
    platform out of `--device auto`; among the others the highest `priority` with a device wins.
    """

    name: str
    package: str
    api_version: str
    summary: str
    probe: str
    platform: str
    seam: Literal["torch", "step"] = "torch"
    topology: Topology = "process_per_device"
    options: type[PluginOptions] = PluginOptions
    requirements: Sequence[Requirement] = ()
    negotiate: Callable[[EngineConfig, ProbeResult], Decision] = accept
    worker_env: Callable[[EngineConfig, Placement], Mapping[str, str]] = no_environment
    ray_resource: str = ""
    """What Ray calls the device: "GPU", "TPU", a name of its own; "": the host's CPUs."""
    exclusive: bool = False
    """The device admits one process at a time."""
    runtime_imports: Sequence[str] = ()
    """Modules of the vendor that may change torch when imported; they are not blamed on the plugin."""
    auto_select: bool = True
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelManifest:
    """A model family: the architecture names of config.json and the dotted "module:Class" that builds it."""

    architectures: Sequence[str]
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyManifest:
    """A scheduling policy: its name for --policy and the dotted "module:Class"."""

    name: str
    policy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposerManifest:
    """What drafts tokens: its name for --speculate and the dotted "module:Class" of an
    anychip.speculation.proposer.Proposer, made without arguments."""

    name: str
    proposer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantFormatManifest:
    """A container of quantized checkpoints: the quantization_config.quant_method that names it in config.json, and the
    dotted "module:Class" of an anychip.quantization.format.WeightFormat, made from that object and the names of the
    checkpoint's tensors."""

    method: str
    format: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandManifest:
    """A command of the `anychip` program: its name, a line for --help, and the dotted module that has
    add_options(parser) and run(arguments), which returns the exit status."""

    name: str
    summary: str
    module: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParserManifest:
    """A parser of model output: its name for --tool-parser or --reasoning-parser, and the dotted "module:Class". A
    tool parser is made without arguments, a reasoning parser with (rest, *, inside), as core's own are."""

    kind: Literal["tool", "reasoning"]
    name: str
    parser: str
