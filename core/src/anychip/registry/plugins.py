"""The installed plugins, each loaded on its own: one that fails is reported, and the others work."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from anychip.errors import AnychipError, IncompatiblePlugin, PluginImportFailed
from anychip.plugin_api.hooks import GROUP, HookSpecs
from anychip.plugin_api.manifest import CommandManifest, PlatformManifest, QuantFormatManifest
from anychip.plugin_api.version import check_api_version
from anychip.registry.blame import calling, versioned
from anychip.registry.quant_methods import METHODS

log = logging.getLogger("anychip.plugins")

HOOKS = (
    "anychip_platforms",
    "anychip_models",
    "anychip_policies",
    "anychip_proposers",
    "anychip_parsers",
    "anychip_quant_formats",
    "anychip_commands",
)
"""Of HookSpecs, in the order in which they are asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenPlugin:
    """A package whose hooks could not be used, and why."""

    package: str
    error: AnychipError


@dataclass(slots=True)
class Plugins:
    """Everything that the installed packages contribute."""

    platforms: dict[str, PlatformManifest] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    policies: dict[str, str] = field(default_factory=dict)
    proposers: dict[str, str] = field(default_factory=dict)
    parsers: dict[str, dict[str, str]] = field(default_factory=lambda: {"tool": {}, "reasoning": {}})
    quant_formats: dict[str, str] = field(default_factory=dict)
    quant_format_packages: dict[str, str] = field(default_factory=lambda: dict.fromkeys(METHODS, "anychip"))
    """By method: who reads it, core's own among them."""
    commands: dict[str, CommandManifest] = field(default_factory=dict)
    broken: list[BrokenPlugin] = field(default_factory=list)


def load_plugins(points: Iterable[EntryPoint] | None = None) -> Plugins:
    """Loads entry-point group "anychip"; `points` replaces it in tests."""
    found = Plugins()
    for point in sorted(entry_points(group=GROUP) if points is None else points, key=lambda p: p.name):
        package = point.dist.name if point.dist else point.value.partition(":")[0]
        try:
            with calling(package, "an anychip hook", level=logging.DEBUG):
                _add(found, point, package)
        except AnychipError as error:
            found.broken.append(BrokenPlugin(package=package, error=error))
    return found


def _add(found: Plugins, point: EntryPoint, package: str) -> None:
    """All of a package's hooks, or none: one that raises leaves nothing behind."""
    hooks = _hooks(point, package)

    def contributed(hook: str) -> list[Any]:
        with calling(package, hook, level=logging.DEBUG):  # a listing has a line for it, not a traceback
            return [item for result in getattr(hooks, hook)() for item in result]

    platforms, models, policies, proposers, parsers, formats, commands = map(contributed, HOOKS)
    readers = _quant_formats(found, formats, package)
    for manifest in platforms:
        check_api_version(manifest.package, manifest.api_version, seam=manifest.seam)
        if manifest.name in found.platforms:
            other = found.platforms[manifest.name].package
            raise IncompatiblePlugin(
                f"{manifest.package} and {other} both bring a device named {manifest.name!r}; remove one"
            )
        found.platforms[manifest.name] = manifest
    for model in models:
        found.models.update(dict.fromkeys(model.architectures, model.model))
    for policy in policies:
        found.policies[policy.name] = policy.policy
    for proposer in proposers:
        found.proposers[proposer.name] = proposer.proposer
    for parser in parsers:
        found.parsers[parser.kind][parser.name] = parser.parser
    found.quant_formats.update(readers)
    found.quant_format_packages.update(dict.fromkeys(readers, package))
    for command in commands:
        found.commands[command.name] = command


def _quant_formats(found: Plugins, formats: Sequence[QuantFormatManifest], package: str) -> dict[str, str]:
    """By method, the dotted class. Raises IncompatiblePlugin for a method that has a reader: of two, one would read
    the other's checkpoints wrongly."""
    readers: dict[str, str] = {}
    for manifest in formats:
        other = package if manifest.method in readers else found.quant_format_packages.get(manifest.method)
        if other is not None:
            remedy = f"rename {package}'s" if other in ("anychip", package) else "remove one"
            raise IncompatiblePlugin(
                f"{package} and {other} both read checkpoints of quantization method {manifest.method!r}; {remedy}"
            )
        readers[manifest.method] = manifest.format
    return readers


def _hooks(point: EntryPoint, package: str) -> Any:
    """The hooks of one package. Raises PluginImportFailed."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(HookSpecs)
    try:
        manager.register(point.load(), name=point.name)
        manager.check_pending()
    except (Exception, SystemExit) as error:  # a stranger's import may raise anything
        log.debug("%s: importing %s raised", package, point.value, exc_info=error)
        raise PluginImportFailed(
            f"{versioned(package)}: importing {point.value} raised {type(error).__name__}: {error}; "
            f"reinstall or remove {package}"
        ) from error
    return manager.hook
