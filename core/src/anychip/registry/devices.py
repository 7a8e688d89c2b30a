"""Probes every platform and chooses the one that runs. Says why each other one was not chosen.

Nothing falls back silently: a device that the user named either starts or ends the program.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

import msgspec

from anychip.config import EngineConfig
from anychip.errors import ConfigError, DeviceUnavailable
from anychip.plugin_api.manifest import Decision, PlatformManifest, PluginOptions, ProbeResult
from anychip.registry.blame import calling
from anychip.registry.plugins import Plugins
from anychip.registry.requirements import CheckedRequirement, check_requirements

log = logging.getLogger("anychip.plugins")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One platform as it stands on this machine."""

    manifest: PlatformManifest
    probe: ProbeResult
    requirements: Sequence[CheckedRequirement]

    @property
    def problems(self) -> list[str]:
        """Why it cannot run; empty when it can."""
        problems = [f"requires {r.describe()}" for r in self.requirements if not r.met and not r.requirement.optional]
        if not self.probe.devices:
            problems.append(self.probe.reason or "no device found")
        return problems

    @property
    def remedy(self) -> str:
        return self.probe.remedy if not self.probe.devices else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenDevice:
    """What runs: a platform, the device indexes in rank order, its options, and how it was chosen."""

    candidate: Candidate
    indexes: tuple[int, ...]
    options: PluginOptions
    reason: str
    decision: Decision

    @property
    def manifest(self) -> PlatformManifest:
        return self.candidate.manifest

    @property
    def per_host(self) -> bool:
        """Whether one process drives all devices."""
        return one_process(self.manifest, self.decision)


def probe(manifest: PlatformManifest) -> ProbeResult:
    """Asks a plugin for its devices. What a probe should not do, raise, becomes a reason."""
    module, _, name = manifest.probe.partition(":")
    remedy = f"reinstall {manifest.package}, or report this to its authors"
    try:
        result = getattr(import_module(module), name)()
    except (Exception, SystemExit) as error:  # a stranger's probe may raise anything
        log.debug("%s: the probe %s raised", manifest.package, manifest.probe, exc_info=error)
        return ProbeResult(reason=f"its probe raised {type(error).__name__}: {error}", remedy=remedy)
    if not isinstance(result, ProbeResult):
        return ProbeResult(reason=f"its probe gave {type(result).__name__}, not a ProbeResult", remedy=remedy)
    return result


def candidates(plugins: Plugins) -> list[Candidate]:
    """Every installed platform, those preferred by --device auto first."""
    manifests = sorted(plugins.platforms.values(), key=lambda m: (not m.auto_select, -m.priority, m.name))
    return [candidate(manifest) for manifest in manifests]


def candidate(manifest: PlatformManifest) -> Candidate:
    return Candidate(manifest=manifest, probe=probe(manifest), requirements=check_requirements(manifest.requirements))


def choose_device(config: EngineConfig, plugins: Plugins) -> ChosenDevice:
    """Resolves `config.device`: "auto", "NAME" or "NAME:INDEX". Raises DeviceUnavailable with cause and remedy."""
    name, _, index_text = config.device.partition(":")
    if name == "auto":
        chosen, reason = _choose_auto(plugins)
    else:
        chosen, reason = choose_named(name, plugins), "named by --device"
    manifest = chosen.manifest
    decision = negotiated(manifest, config, chosen.probe)
    indexes = _indexes(config, chosen, index_text, per_host=one_process(manifest, decision))
    if decision.refuse:
        raise ConfigError(f"{manifest.package} refuses this configuration: " + "; ".join(decision.refuse))
    options = parsed_options(manifest, config.device_options)
    return ChosenDevice(candidate=chosen, indexes=indexes, options=options, reason=reason, decision=decision)


def for_one_host(config: EngineConfig, num_ranks: int = 1) -> EngineConfig:
    """The configuration as one host sees it that chooses devices for so many of the ranks."""
    return msgspec.structs.replace(
        config,
        nodes=(),
        cluster_key=None,
        tensor_parallel_size=num_ranks,
        pipeline_parallel_size=1,
        pipeline_layers=(),
        data_parallel_size=1,
        context_parallel_size=1,
    )


def negotiated(manifest: PlatformManifest, config: EngineConfig, probe: ProbeResult) -> Decision:
    """A platform's answer to a configuration. Raises PluginFailed where it raises."""
    with calling(manifest.package, "PlatformManifest.negotiate"):
        return manifest.negotiate(config, probe)


def one_process(manifest: PlatformManifest, decision: Decision) -> bool:
    """Whether one process is to drive all of a platform's devices."""
    return (decision.topology or manifest.topology) == "process_per_host"


def parsed_options(manifest: PlatformManifest, given: Mapping[str, str]) -> PluginOptions:
    """--device-opt as the plugin's own dataclass. Raises ConfigError; PluginFailed where the plugin's class raises."""
    with calling(manifest.package, "PlatformManifest.options"):
        return manifest.options.parse(manifest.package, given)


def _choose_auto(plugins: Plugins) -> tuple[Candidate, str]:
    passed_over: list[str] = []
    for option in candidates(plugins):
        if not option.manifest.auto_select:
            continue
        if not option.problems:
            reason = "first by --device auto"
            return option, reason + (f" (not {'; not '.join(passed_over)})" if passed_over else "")
        passed_over.append(f"{option.manifest.name}: {option.problems[0]}")
    broken = [f"{b.package}: {b.error}" for b in plugins.broken]
    raise DeviceUnavailable(
        "no device can run: " + ("; ".join(passed_over + broken) or "no plugin is installed")
        + '; install one, for example pip install "anychip[cpu]"'
    )  # fmt: skip


def named_manifest(name: str, plugins: Plugins) -> PlatformManifest:
    """Whether its device is here or not. Raises DeviceUnavailable where no plugin brings it."""
    manifest = plugins.platforms.get(name)
    if manifest is not None:
        return manifest
    for broken in plugins.broken:
        if broken.package.removeprefix("anychip-") == name:
            raise DeviceUnavailable(f"device {name!r}: {broken.error}") from broken.error
    raise DeviceUnavailable(
        f"device {name!r} is unknown; installed are {', '.join(sorted(plugins.platforms)) or 'none'}; "
        f'try pip install "anychip[{name}]"'
    )


def choose_named(name: str, plugins: Plugins) -> Candidate:
    """The platform of that name, which can run. Raises DeviceUnavailable with cause and remedy."""
    chosen = candidate(named_manifest(name, plugins))
    if chosen.problems:
        remedy = f"; {chosen.remedy}" if chosen.remedy else ""
        raise DeviceUnavailable(f"device {name!r} cannot start: {'; '.join(chosen.problems)}{remedy}")
    return chosen


def _indexes(config: EngineConfig, chosen: Candidate, index_text: str, *, per_host: bool) -> tuple[int, ...]:
    """Devices in rank order: as many as there are ranks, from the named one on."""
    manifest = chosen.manifest
    available = [device.index for device in chosen.probe.devices]
    if index_text:
        if not index_text.isdigit() or int(index_text) not in available:
            raise DeviceUnavailable(
                f"device {config.device!r}: {manifest.name} has devices {', '.join(map(str, available))}"
            )
        available = available[available.index(int(index_text)) :]
    if per_host:
        if config.parallel_sizes.num_ranks > 1:
            raise ConfigError(
                f"{manifest.name} drives its {len(available)} devices from one process; leave "
                f"{config.parallel_sizes.settings} at 1"
            )
        return tuple(available)
    wanted = config.parallel_sizes.num_ranks
    if len(available) < wanted:
        raise DeviceUnavailable(
            f"{config.parallel_sizes} needs as many {manifest.name} devices, {len(available)} are there"
        )
    return tuple(available[:wanted])
