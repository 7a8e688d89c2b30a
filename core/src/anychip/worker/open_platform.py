"""Opens a platform: loads its class by name, checks it, and hands it the reference implementations."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import msgspec

from anychip.config import WorkerSpec
from anychip.errors import AnychipError, DeviceUnavailable, InvalidOverride, PluginImportFailed, Unsupported
from anychip.ops.reference import REFERENCE
from anychip.plugin_api import Platform, PlatformContext, PlatformManifest, PluginOptions, ProbeResult
from anychip.registry.plugins import Plugins


def open_for(spec: WorkerSpec, plugins: Plugins) -> tuple[PlatformManifest, Platform]:
    """The platform of a worker's device. Raises DeviceUnavailable where its plugin is not installed."""
    manifest = plugins.platforms.get(spec.device)
    if manifest is None:
        raise DeviceUnavailable(f"device {spec.device!r} is not installed in the worker's environment")
    platform = open_platform(
        manifest,
        device_indexes=spec.device_indexes,
        options=manifest.options.parse(manifest.package, spec.config.device_options),
        probe=msgspec.convert(spec.probe, ProbeResult),
    )
    return manifest, platform


def open_platform(
    manifest: PlatformManifest, *, device_indexes: Sequence[int], options: PluginOptions, probe: ProbeResult
) -> Platform:
    """Raises PluginImportFailed when the class cannot be loaded, InvalidOverride when it is not a Platform."""
    module, _, name = manifest.platform.partition(":")
    try:
        for runtime in manifest.runtime_imports:
            import_module(runtime)
        cls = getattr(import_module(module), name)
    except AnychipError:
        raise
    except Exception as error:
        raise PluginImportFailed(
            f"{manifest.package}: loading {manifest.platform} raised {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Platform)):
        raise InvalidOverride(f"{manifest.package}: {manifest.platform} is not a subclass of plugin_api.Platform")
    platform = cls(
        PlatformContext(
            manifest=manifest,
            device_indexes=tuple(device_indexes),
            options=options,
            probe=probe,
            reference=REFERENCE,
        )
    )
    if platform.step_rules.decode_steps_per_launch != 1:
        raise Unsupported(manifest.package, ["decode_steps_per_launch above 1 is not part of interface 0.1"])
    return platform
