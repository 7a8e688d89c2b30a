"""Plugins are loaded one by one, devices chosen with reasons, and nothing falls back in silence."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

import msgspec
import pytest

from anychip.config import EngineConfig
from anychip.errors import ConfigError, DeviceUnavailable, IncompatiblePlugin, PluginImportFailed
from anychip.launch.build import fill_unset
from anychip.launch.worker_spec import worker_spec
from anychip.plugin_api import (
    API_VERSION,
    Decision,
    DeviceInfo,
    PlatformManifest,
    PluginOptions,
    ProbeResult,
    QuantFormatManifest,
    Requirement,
    ShapePolicy,
    hookimpl,
)
from anychip.plugin_api.version import check_shape_policy
from anychip.registry.devices import candidates, choose_device
from anychip.registry.plugins import load_plugins


class Point:
    """An entry point, as importlib.metadata has them."""

    def __init__(self, name: str, plugin: object) -> None:
        self.name, self.value, self.dist = name, f"pkg_{name}:hooks", None
        self._plugin = plugin

    def load(self) -> object:
        if isinstance(self._plugin, Exception):
            raise self._plugin
        return self._plugin


def plugin(*manifests: PlatformManifest) -> object:
    class Hooks:
        @hookimpl
        def anychip_platforms(self):
            return manifests

    return Hooks()


PROBES = ModuleType("registry_probes")
PROBES.two = lambda: ProbeResult(devices=(DeviceInfo(index=0, name="x"), DeviceInfo(index=1, name="x")))
PROBES.none = lambda: ProbeResult(reason="no driver", remedy="install the driver")
PROBES.raising = lambda: 1 / 0
sys.modules["registry_probes"] = PROBES


def manifest(name: str, probe: str = "two", **more: object) -> PlatformManifest:
    return PlatformManifest(
        name=name,
        package=f"anychip-{name}",
        summary="",
        probe=f"registry_probes:{probe}",
        platform="nowhere:Platform",
        **{"api_version": API_VERSION, **more},  # type: ignore[arg-type]
    )


def plugins(*manifests: PlatformManifest):
    return load_plugins([Point(m.name, plugin(m)) for m in manifests])


def test_a_plugin_that_fails_to_import_is_reported_and_the_others_work():
    found = load_plugins(
        [Point("bad", ImportError("libacme.so is not there")), Point("good", plugin(manifest("good")))]
    )
    assert list(found.platforms) == ["good"]
    (broken,) = found.broken
    assert isinstance(broken.error, PluginImportFailed)
    assert "libacme.so is not there" in str(broken.error)


def test_a_plugin_of_another_interface_version_is_reported():
    found = plugins(manifest("old", api_version="0.7"))
    assert not found.platforms
    assert isinstance(found.broken[0].error, IncompatiblePlugin)


def test_a_plugin_of_the_interface_before_is_served_where_the_change_does_not_touch_it():
    found = plugins(manifest("kernels", api_version="0.1"), manifest("steps", api_version="0.1", seam="step"))
    assert list(found.platforms) == ["kernels"]
    text = str(found.broken[0].error)
    assert "anychip-steps: its step program was written against interface 0.1" in text
    assert "SamplingInputs by sample" in text and "docs/reference/versioning.md" in text


def test_a_shape_policy_of_the_interface_before_is_told_what_to_change():
    class Old(ShapePolicy):
        def bucket(self, *, num_tokens, num_reqs, max_query_len, num_pages, features):
            raise AssertionError

    class Passes(ShapePolicy):
        def bucket(self, **sizes):
            return super().bucket(**sizes)

    check_shape_policy("anychip-x", ShapePolicy().bucket)
    check_shape_policy("anychip-x", Passes().bucket)
    with pytest.raises(IncompatiblePlugin, match=r"anychip-x: .*Old\.bucket takes no num_samples"):
        check_shape_policy("anychip-x", Old().bucket)


def test_a_hook_with_a_wrong_signature_is_reported():
    class Hooks:
        @hookimpl
        def anychip_platforms(self, surprise):
            return []

    (broken,) = load_plugins([Point("odd", Hooks())]).broken
    assert "surprise" in str(broken.error)


def test_two_packages_may_not_bring_the_same_device():
    found = load_plugins([Point("a", plugin(manifest("x"))), Point("b", plugin(manifest("x")))])
    assert "both bring a device named 'x'" in str(found.broken[0].error)


def test_auto_takes_the_first_that_can_run_and_says_what_it_passed_over():
    found = plugins(manifest("fast", "none", priority=9), manifest("slow"))
    chosen = choose_device(EngineConfig(), found)
    assert chosen.manifest.name == "slow"
    assert "fast: no driver" in chosen.reason


def test_auto_leaves_out_what_is_chosen_by_name_only():
    with pytest.raises(DeviceUnavailable, match="no device can run"):
        choose_device(EngineConfig(), plugins(manifest("fake", auto_select=False)))


def test_a_named_device_that_cannot_start_aborts_with_cause_and_remedy():
    found = plugins(manifest("fast", "none"), manifest("slow"))
    with pytest.raises(DeviceUnavailable, match="'fast' cannot start: no driver; install the driver"):
        choose_device(EngineConfig(device="fast"), found)


def test_an_unmet_requirement_is_a_cause():
    need = Requirement(kind="package", name="surely-not-installed", range=">=2", remedy="pip install it")
    with pytest.raises(DeviceUnavailable, match="requires surely-not-installed >=2: not found; pip install it"):
        choose_device(EngineConfig(device="x"), plugins(manifest("x", requirements=[need])))


def test_an_unknown_device_names_the_known_ones():
    with pytest.raises(DeviceUnavailable, match="'tpux' is unknown; installed are slow"):
        choose_device(EngineConfig(device="tpux"), plugins(manifest("slow")))


def test_a_probe_that_raises_becomes_a_reason():
    (option,) = candidates(plugins(manifest("x", "raising")))
    assert "its probe raised ZeroDivisionError" in option.problems[0]


def test_an_index_names_the_first_device():
    found = plugins(manifest("x"))
    assert choose_device(EngineConfig(device="x:1"), found).indexes == (1,)
    with pytest.raises(DeviceUnavailable, match="x has devices 0, 1"):
        choose_device(EngineConfig(device="x:7"), found)


def test_tensor_parallelism_needs_as_many_devices():
    found = plugins(manifest("x"))
    assert choose_device(EngineConfig(device="x", tensor_parallel_size=2), found).indexes == (0, 1)
    with pytest.raises(DeviceUnavailable, match="tensor_parallel_size 3 needs as many x devices, 2 are there"):
        choose_device(EngineConfig(device="x", tensor_parallel_size=3), found)


@dataclass(frozen=True, kw_only=True)
class Runtimes(PluginOptions):
    runtime: str = "a"


def test_one_process_drives_all_devices_if_the_runtime_that_will_be_opened_does(tmp_path):
    """The manifest's answer is for runtimes that do not differ."""

    def negotiate(config, probe):
        return Decision(topology="process_per_host" if config.device_options.get("runtime") == "b" else None)

    found = plugins(manifest("x", negotiate=negotiate, options=Runtimes))
    alone = choose_device(EngineConfig(device="x"), found)
    assert (alone.indexes, alone.per_host) == ((0,), False)
    config = EngineConfig(device="x", device_options={"runtime": "b"})
    together = choose_device(config, found)
    assert (together.indexes, together.per_host) == ((0, 1), True)
    spec = worker_spec(config, together, tmp_path, rank=0)
    assert (spec.device_indexes, spec.world_size) == ((0, 1), 1)
    with pytest.raises(ConfigError, match="drives its 2 devices from one process; leave tensor_parallel_size at 1"):
        choose_device(msgspec.structs.replace(config, tensor_parallel_size=2), found)


def test_a_platform_that_refuses_a_configuration_says_why():
    def negotiate(config, probe):
        return Decision(refuse=("overlap is not for this device",))

    with pytest.raises(ConfigError, match="overlap is not for this device"):
        choose_device(EngineConfig(device="x"), plugins(manifest("x", negotiate=negotiate)))


def test_negotiation_fills_what_is_unset_and_never_overrides_the_user():
    decision = Decision(fill={"block_size": 128, "max_num_seqs": 8})
    filled = fill_unset(EngineConfig(max_num_seqs=4), decision)
    assert (filled.block_size, filled.max_num_seqs) == (128, 4)
    with pytest.raises(ConfigError, match="fills 'blocksize', which is no setting"):
        fill_unset(EngineConfig(), Decision(fill={"blocksize": 128}))


def with_formats(name: str, *methods: str) -> Point:
    class Hooks:
        @hookimpl
        def anychip_platforms(self):
            return [manifest(name)]

        @hookimpl
        def anychip_quant_formats(self):
            return [QuantFormatManifest(method=method, format=f"pkg_{name}.reader:Reader") for method in methods]

    return Point(name, Hooks())


def test_a_package_brings_containers_of_quantized_checkpoints():
    found = load_plugins([with_formats("acme", "acme-q3", "acme-q5"), with_formats("other", "other-q")])
    assert not found.broken
    assert found.quant_formats == {
        "acme-q3": "pkg_acme.reader:Reader",
        "acme-q5": "pkg_acme.reader:Reader",
        "other-q": "pkg_other.reader:Reader",
    }


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (
            [("acme", "q3"), ("other", "q5", "q3")],
            "pkg_other and pkg_acme both read checkpoints of quantization method 'q3'; remove one",
        ),
        ([("acme", "gptq")], "pkg_acme and anychip both read checkpoints of quantization method 'gptq'; rename pkg_"),
        ([("acme", "q3", "q3")], "pkg_acme and pkg_acme both read checkpoints of quantization method 'q3'; rename"),
    ],
)
def test_two_readers_of_one_method_are_refused_both_named(points, said):
    found = load_plugins([with_formats(name, *methods) for name, *methods in points])
    (broken,) = found.broken
    assert isinstance(broken.error, IncompatiblePlugin) and str(broken.error).startswith(said)
    assert list(found.platforms) == [name for name, *_ in points[:-1]], "of the later one nothing is kept"
    assert "q5" not in found.quant_formats
