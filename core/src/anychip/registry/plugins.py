"""The installed plugins, each loaded on its own: one that fails is reported, and the others work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from anychip.errors import AnychipError, IncompatiblePlugin, PluginImportFailed
from anychip.plugin_api.hooks import GROUP, HookSpecs
from anychip.plugin_api.manifest import CommandManifest, PlatformManifest
from anychip.plugin_api.version import check_api_version


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
    parsers: dict[str, dict[str, str]] = field(default_factory=lambda: {"tool": {}, "reasoning": {}})
    commands: dict[str, CommandManifest] = field(default_factory=dict)
    broken: list[BrokenPlugin] = field(default_factory=list)


def load_plugins(points: Iterable[EntryPoint] | None = None) -> Plugins:
    """Loads entry-point group "anychip"; `points` replaces it in tests."""
    found = Plugins()
    for point in sorted(entry_points(group=GROUP) if points is None else points, key=lambda p: p.name):
        package = point.dist.name if point.dist else point.value.partition(":")[0]
        try:
            _add(found, point)
        except AnychipError as error:
            found.broken.append(BrokenPlugin(package=package, error=error))
        except Exception as error:  # noqa: BLE001 - a stranger's import may raise anything
            failed = PluginImportFailed(
                f"{package}: importing {point.value} raised {type(error).__name__}: {error}; "
                f"reinstall or remove {package}"
            )
            found.broken.append(BrokenPlugin(package=package, error=failed))
    return found


def _add(found: Plugins, point: EntryPoint) -> None:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(HookSpecs)
    manager.register(point.load(), name=point.name)
    manager.check_pending()
    for manifest in _flat(manager.hook.anychip_platforms()):
        check_api_version(manifest.package, manifest.api_version)
        if manifest.name in found.platforms:
            other = found.platforms[manifest.name].package
            raise IncompatiblePlugin(
                f"{manifest.package} and {other} both bring a device named {manifest.name!r}; remove one"
            )
        found.platforms[manifest.name] = manifest
    for model in _flat(manager.hook.anychip_models()):
        found.models.update(dict.fromkeys(model.architectures, model.model))
    for policy in _flat(manager.hook.anychip_policies()):
        found.policies[policy.name] = policy.policy
    for parser in _flat(manager.hook.anychip_parsers()):
        found.parsers[parser.kind][parser.name] = parser.parser
    for command in _flat(manager.hook.anychip_commands()):
        found.commands[command.name] = command


def _flat(results: Iterable[Iterable[Any]]) -> list[Any]:
    return [item for result in results for item in result]
