"""Says whose code raised: the package with its version, the hook, the cause and a remedy.

What a plugin names by a dotted string is loaded by `imported`; a direct call of a hook stands in `calling`. Where core
runs a plugin's objects for long, as a worker does, one boundary catches what comes and asks `blamed`, which finds the
plugin in the traceback.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version
from types import FrameType
from typing import Any

from anychip.errors import AnychipError, ConfigError, PluginFailed, PluginImportFailed
from anychip.plugin_api.hooks import GROUP
from anychip.plugin_api.manifest import PlatformManifest

log = logging.getLogger("anychip.plugins")

_CORE = "anychip"


def versioned(package: str) -> str:
    """A package's name with its version, where it is installed as a package."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package


def imported(dotted: str, package: str = "") -> Any:
    """The object that "module:attribute" names; core's own go the same way. Raises PluginImportFailed."""
    module, _, attribute = dotted.partition(":")
    root = module.partition(".")[0]
    try:
        return getattr(import_module(module), attribute)
    except AnychipError:
        raise
    except (Exception, SystemExit) as error:  # a stranger's import may raise anything
        if root == _CORE:
            raise
        package = package or package_of(dotted)
        log.debug("%s: importing %s raised", package, dotted, exc_info=error)
        raise PluginImportFailed(
            f"{versioned(package)}: importing {dotted} raised {type(error).__name__}: {error}; "
            f"reinstall {package}, or report this to its authors"
        ) from error


def made_by_name(name: str, own: Mapping[str, str], contributed: Mapping[str, str], *, unknown: str) -> Any:
    """What a name stands for, made without arguments: one of core's `own` dotted classes, or one that a plugin
    contributed. Raises ConfigError, which begins with `unknown`, for a name that is neither."""
    dotted = own.get(name) or contributed.get(name)
    if dotted is None:
        raise ConfigError(f"{unknown}; there are {', '.join(sorted({*own, *contributed}))}")
    make = imported(dotted)
    with calling(package_of(dotted), dotted):
        return make()


@contextmanager
def calling(package: str, hook: str, *, level: int = logging.ERROR) -> Iterator[None]:
    """Around a call of one of a plugin's hooks. Raises PluginFailed for what the hook may not raise; the traceback goes
    to the log, at `level`."""
    try:
        yield
    except AnychipError:
        raise
    except (Exception, SystemExit) as error:
        raise _failed(package, hook, error, level) from error


def blamed(error: BaseException, manifest: PlatformManifest | None = None) -> PluginFailed | None:
    """The plugin whose code raised `error`, with the function of it that core called. None: no plugin's code was
    running, or the error says by itself what happened."""
    if isinstance(error, AnychipError | KeyboardInterrupt):
        return None
    packages = _packages(manifest)
    trace = error.__traceback__
    while trace is not None:
        module = _module(trace.tb_frame)
        package = packages.get(module.partition(".")[0])
        if package is not None:
            return _failed(package, f"{module}:{trace.tb_frame.f_code.co_qualname}", error)
        trace = trace.tb_next
    return None


def _failed(package: str, hook: str, error: BaseException, level: int = logging.ERROR) -> PluginFailed:
    log.log(level, "%s: %s raised", package, hook, exc_info=error)
    return PluginFailed.of(versioned(package), hook, error)


def package_of(dotted: str) -> str:
    """The package that brings what a dotted name names, as far as that is known."""
    root = dotted.partition(":")[0].partition(".")[0]
    return root if root == _CORE else _packages(None).get(root, root)  # all metadata on this machine is a lot to read


def _packages(manifest: PlatformManifest | None) -> Mapping[str, str]:
    """By top-level module, the plugin that it belongs to."""
    found = {
        point.value.partition(":")[0].partition(".")[0]: point.dist.name
        for point in entry_points(group=GROUP)
        if point.dist is not None
    }
    if manifest is not None:
        for dotted in (manifest.probe, manifest.platform):
            found[dotted.partition(":")[0].partition(".")[0]] = manifest.package
    found.pop(_CORE, None)
    return found


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
