"""Whatever a plugin raises in a hook is reported with the package, the hook and what to do."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest

from anychip.chat.parsers.registry import choose_parsers
from anychip.config import EngineConfig
from anychip.errors import AnychipError, PluginError, PluginFailed, PluginImportFailed, rebuild
from anychip.launch.build import build_engine
from anychip.plugin_api import API_VERSION, DeviceInfo, PlatformManifest, PluginOptions, ProbeResult, hookimpl
from anychip.plugin_api.hooks import HookSpecs
from anychip.registry.blame import blamed, imported
from anychip.registry.devices import candidates, choose_device
from anychip.registry.plugins import HOOKS, Plugins, load_plugins
from anychip.scheduler.policy import make_policy

STRANGER = ModuleType("stranger")
sys.modules["stranger"] = STRANGER
HOOK_NAMES = [name for name, _ in inspect.getmembers(HookSpecs, inspect.isfunction) if not name.startswith("_")]


def boom(*args: object, **kwargs: object) -> object:
    raise RuntimeError("boom")


def leave(*args: object, **kwargs: object) -> object:
    raise SystemExit("the driver is not there")


STRANGER.boom, STRANGER.leave = boom, leave
STRANGER.nothing = lambda: None
STRANGER.one = lambda: ProbeResult(devices=(DeviceInfo(index=0, name="x"),))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Raising(PluginOptions):
    def __post_init__(self) -> None:
        raise RuntimeError("boom")


def platform(**more: object) -> PlatformManifest:
    settings = {"probe": "stranger:one", "platform": "stranger:Platform", **more}
    return PlatformManifest(name="x", package="anychip-x", summary="", api_version=API_VERSION, **settings)  # type: ignore[arg-type]


def installed(manifest: PlatformManifest) -> Plugins:
    return Plugins(platforms={manifest.name: manifest})


def point(hooks: object) -> SimpleNamespace:
    return SimpleNamespace(name="x", value="stranger:hooks", dist=None, load=lambda: hooks)


def test_every_hook_of_the_interface_is_asked():
    assert sorted(HOOKS) == HOOK_NAMES


@pytest.mark.parametrize("name", HOOK_NAMES)
@pytest.mark.parametrize("wrong", [boom, leave, lambda: 5, lambda: [object()]])
def test_a_hook_that_raises_or_gives_something_else_is_a_broken_plugin(name, wrong):
    hooks = SimpleNamespace()
    setattr(hooks, name, hookimpl(lambda: wrong()))
    found = load_plugins([point(hooks)])  # type: ignore[list-item]
    (broken,) = found.broken
    assert broken.package == "stranger" and isinstance(broken.error, PluginError)
    assert "stranger" in str(broken.error) and "report this" in str(broken.error)
    if wrong in (boom, leave):
        assert name in str(broken.error)


@pytest.mark.parametrize("name", ["boom", "leave", "nothing", "absent"])
def test_a_probe_that_does_not_answer_becomes_a_reason_with_a_remedy(name):
    (option,) = candidates(installed(platform(probe=f"stranger:{name}")))
    assert "its probe" in option.problems[0] and "anychip-x" in option.remedy


@pytest.mark.parametrize("given", [{"negotiate": boom}, {"negotiate": leave}, {"options": Raising}])
def test_a_manifest_that_raises_when_a_device_is_chosen_is_named(given):
    with pytest.raises(PluginFailed, match=rf"^anychip-x: PlatformManifest.{next(iter(given))} raised \w+: .*report"):
        choose_device(EngineConfig(device="x"), installed(platform(**given)))


def test_a_worker_environment_that_raises_is_named(tmp_path):
    model = SimpleNamespace(max_positions=8)
    with pytest.raises(PluginFailed, match=r"^anychip-x: PlatformManifest.worker_env raised RuntimeError: boom"):
        build_engine(EngineConfig(device="x"), model, installed(platform(worker_env=boom)), tmp_path)  # type: ignore[arg-type]


def test_a_policy_and_a_parser_that_raise_are_named():
    with pytest.raises(PluginFailed, match=r"^stranger: stranger:boom raised RuntimeError: boom"):
        make_policy("late", {"late": "stranger:boom"})
    with pytest.raises(PluginImportFailed, match=r"^stranger: importing stranger:absent raised AttributeError"):
        choose_parsers("odd", "none", None, {"tool": {"odd": "stranger:absent"}})
    with pytest.raises(PluginImportFailed, match=r"importing not_there:Class raised ModuleNotFoundError"):
        imported("not_there:Class")


def code(text: str, module: str) -> ModuleType:
    made = ModuleType(module)
    exec(compile(text, f"<{module}>", "exec"), made.__dict__)
    return made


def caught(call: object) -> BaseException:
    try:
        call()  # type: ignore[operator]
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - what was raised is what is asked for
        return error
    raise AssertionError("nothing was raised")


def test_the_first_function_of_the_plugin_in_the_traceback_is_named(caplog):
    plugin = code(
        "class P:\n def memory(self): return self.deeper()\n def deeper(self): return 1 / 0", "anychip_zeta.a"
    )
    error = caught(plugin.P().memory)
    manifest = platform(platform="anychip_zeta.a:P")
    with caplog.at_level(logging.ERROR, logger="anychip.plugins"):
        failed = blamed(error, manifest)
    assert str(failed).startswith("anychip-x: anychip_zeta.a:P.memory raised ZeroDivisionError: division by zero")
    assert "deeper" in caplog.text, "the traceback is in the log"


def test_what_no_plugin_raised_is_blamed_on_none():
    assert blamed(caught(lambda: 1 / 0), platform(platform="anychip_zeta.a:P")) is None
    plugin = code("def interrupted(): raise KeyboardInterrupt", "anychip_zeta")
    assert blamed(caught(plugin.interrupted), platform(platform="anychip_zeta.a:P")) is None


def test_an_error_that_says_what_happened_passes_as_it_is():
    error = AnychipError("the lid is open")
    assert blamed(error, platform()) is None


def test_the_name_crosses_processes():
    failed = PluginFailed.of("anychip-x 1.0", "Platform.memory", ValueError("boom"))
    assert isinstance(rebuild(type(failed).__name__, str(failed)), PluginFailed)
