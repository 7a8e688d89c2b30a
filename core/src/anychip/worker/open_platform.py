"""Opens a platform: loads its class by name, checks it, and hands it the reference implementations."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

import msgspec

from anychip.errors import DeviceFault, DeviceUnavailable, InvalidOverride
from anychip.ops.reference import REFERENCE
from anychip.plugin_api import Platform, PlatformContext, PlatformManifest, PluginOptions, ProbeResult
from anychip.process_specs import WorkerSpec
from anychip.registry.blame import blamed, calling, imported, versioned
from anychip.registry.devices import parsed_options
from anychip.registry.plugins import Plugins

log = logging.getLogger("anychip.plugins")


def open_for(spec: WorkerSpec, plugins: Plugins) -> Platform:
    """The platform of a worker's device. Raises DeviceUnavailable where its plugin is not installed."""
    manifest = plugins.platforms.get(spec.device)
    if manifest is None:
        raise DeviceUnavailable(f"device {spec.device!r} is not installed in the worker's environment")
    return open_platform(
        manifest,
        device_indexes=spec.device_indexes,
        options=parsed_options(manifest, spec.config.device_options),
        probe=msgspec.convert(spec.probe, ProbeResult),
    )


def open_platform(
    manifest: PlatformManifest, *, device_indexes: Sequence[int], options: PluginOptions, probe: ProbeResult
) -> Platform:
    """Raises PluginImportFailed when the class cannot be loaded, InvalidOverride when it is not a Platform, has a
    method that cannot be called as core calls it or a mesh of other devices than it was given, PluginFailed when it
    raises as it opens."""
    cls = _loaded(manifest)
    context = PlatformContext(
        manifest=manifest,
        device_indexes=tuple(device_indexes),
        options=options,
        probe=probe,
        reference=REFERENCE,
    )
    with calling(manifest.package, manifest.platform):
        platform = cls(context)
        _ = platform.step_rules, platform.capabilities  # properties of a plugin's may raise
        devices = platform.device_mesh
    if devices.size != len(context.device_indexes):
        raise InvalidOverride(
            f"{manifest.package}: {manifest.platform}.device_mesh is {devices}, {devices.size} in all, and the process "
            f"drives {len(context.device_indexes)}; the manifest's topology, or the Decision of negotiate, must "
            "be that of the runtime that was opened"
        )
    return platform


def _loaded(manifest: PlatformManifest) -> type[Platform]:
    with calling(manifest.package, "PlatformManifest.runtime_imports"):
        for runtime in manifest.runtime_imports:
            import_module(runtime)
    cls = imported(manifest.platform, manifest.package)
    if not (isinstance(cls, type) and issubclass(cls, Platform)):
        raise InvalidOverride(f"{manifest.package}: {manifest.platform} is not a subclass of plugin_api.Platform")
    _check_methods(manifest, cls)
    return cls


def _check_methods(manifest: PlatformManifest, cls: type[Platform]) -> None:
    """Every method that the class overrides takes what core passes to the base class's."""
    for name, base in inspect.getmembers(Platform, inspect.isfunction):
        own = inspect.getattr_static(cls, name)
        if name.startswith("_") or own is base or not inspect.isfunction(own):
            continue
        asked = inspect.signature(base).parameters
        # As core calls: what the interface has by keyword alone goes by keyword, the rest by place.
        by_place = [p for p in asked.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        by_name = {p.name: p for p in asked.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        try:
            inspect.signature(own).bind(*by_place, **by_name)
        except TypeError as error:
            raise InvalidOverride(
                f"{versioned(manifest.package)}: core cannot call {manifest.platform}.{name}: {error}; "
                f"the interface has {name}{inspect.signature(base)}"
            ) from error


@contextmanager
def explained(platform: Platform, *, others_wait: bool = False) -> Iterator[None]:
    """Errors within leave in anychip's words: a device's fault, as the platform explains it, or PluginFailed for what a
    plugin's code raised. Others pass as they are. `others_wait`: for what this rank computes, so that every fault is
    fatal."""
    try:
        yield
    except BaseException as error:
        known = error if isinstance(error, DeviceFault) else None
        named = _explained(platform, error) or known or blamed(error, platform.context.manifest)
        if others_wait and isinstance(named, DeviceFault) and not named.fatal:
            named = DeviceFault(
                f"{named}; the other stages wait for this one's step", kind=named.kind, fatal=True, ranks=named.ranks
            )
        if named is None or named is error:
            raise
        raise named from error


def _explained(platform: Platform, error: BaseException) -> DeviceFault | None:
    try:
        return platform.explain(error)
    except Exception:  # the error that was to be explained matters more
        log.exception("%s: Platform.explain raised", platform.context.manifest.package)
        return None
