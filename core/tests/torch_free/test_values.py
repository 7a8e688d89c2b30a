"""Values that cross modules: parameters, configuration, messages."""

from __future__ import annotations

import math

import msgspec
import pytest

from anychip.config import EngineConfig
from anychip.entrypoints.cli.options import parse_count
from anychip.environment import Environment
from anychip.errors import ConfigError, EngineDead, InvalidRequest, KVCacheTooSmall, Unsupported, rebuild
from anychip.messages import AddRequest, Outputs, SequenceDelta, ToEngine
from anychip.plugin_api.manifest import PluginOptions
from anychip.plugin_api.version import API_VERSION, check_api_version
from anychip.sampling_params import SamplingParams
from anychip.step_messages import TokenLogprobs


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("top_p", 0), ("top_p", 1.5), ("top_p", math.nan), ("top_k", -2), ("min_p", -0.1), ("min_p", 2),
        ("n", 0), ("n", 1000), ("max_tokens", 0), ("min_tokens", -1), ("seed", 2**64), ("logprobs", 21),
        ("stop", ("",)), ("stop", ("x" * 1000,)), ("stop", ("x",) * 99), ("stop_token_ids", (-1,)),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(InvalidRequest) as refused:
        SamplingParams(**{name: value})
    assert refused.value.param == name


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(InvalidRequest, match="min_tokens is 5, above max_tokens 4"):
        SamplingParams(max_tokens=4, min_tokens=5)


def test_messages_survive_the_wire():
    encoder = msgspec.msgpack.Encoder()
    request = AddRequest("r", bytes(8), SamplingParams(temperature=0.5, stop=("x",)), 7, (2,), cache_salt="s")
    assert msgspec.msgpack.decode(encoder.encode(request), type=ToEngine) == request
    outputs = Outputs([SequenceDelta("r", 0, [5], "stop", [TokenLogprobs(-0.5, [5], [-0.5])], cached_tokens=3)])
    assert msgspec.msgpack.decode(encoder.encode(outputs), type=Outputs) == outputs


@pytest.mark.parametrize(
    "values",
    [
        {"max_num_seqs": 0}, {"memory_fraction": 0}, {"memory_fraction": 2}, {"dtype": "float7"},
        {"num_kv_blocks": 9, "kv_cache_bytes": 9}, {"executor": "inline", "tensor_parallel_size": 2},
        {"pipeline_parallel_size": 0}, {"executor": "inline", "pipeline_parallel_size": 2},
        {"pipeline_parallel_size": 2, "pipeline_layers": (3,)}, {"pipeline_layers": (3, 4)},
        {"pipeline_parallel_size": 2, "pipeline_layers": (3, 0)}, {"pipeline_parallel_size": 2, "taps": (1,)},
        {"pipeline_parallel_size": 2, "speculate": "ngram"},
        {"context_parallel_size": 0}, {"executor": "inline", "context_parallel_size": 2},
        {"context_parallel_size": 2, "speculate": "eagle:HEAD"},
    ],
)  # fmt: skip
def test_an_impossible_configuration_is_refused(values):
    with pytest.raises(ConfigError):
        EngineConfig(**values)


def test_an_unknown_variable_is_an_error(monkeypatch):
    monkeypatch.setenv("ANYCHIP_DEVIEC", "cpu")
    with pytest.raises(ConfigError, match="ANYCHIP_DEVIEC; known are .*ANYCHIP_DEVICE"):
        Environment.read()


@pytest.mark.parametrize("version", ["9.0", "1.0", "0.9", "one"])
def test_an_interface_version_that_core_does_not_speak_is_refused(version):
    with pytest.raises(Exception, match="speaks " + API_VERSION):
        check_api_version("anychip-x", version)


def test_options_are_parsed_by_type_and_unknown_ones_refused():
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Options(PluginOptions):
        threads: int = 0
        fast: bool = False

    assert Options.parse("p", {"threads": "3", "fast": "yes"}) == Options(threads=3, fast=True)
    with pytest.raises(ConfigError, match="no such option; it has fast, threads"):
        Options.parse("p", {"thread": "3"})
    with pytest.raises(ConfigError, match="'maybe' is not true or false"):
        Options.parse("p", {"fast": "maybe"})


def test_an_error_of_another_process_keeps_its_type():
    assert isinstance(rebuild("KVCacheTooSmall", "m"), KVCacheTooSmall)
    assert isinstance(rebuild("ValueError", "m"), EngineDead)
    assert str(rebuild("Unsupported", "anychip-tpu: attention is not implemented yet")) == (
        "anychip-tpu: attention is not implemented yet"
    )
    assert isinstance(rebuild("Unsupported", "x: y"), Unsupported)


@pytest.mark.parametrize(("text", "value"), [("4096", 4096), ("4k", 4096), ("2G", 2**31), ("1GiB", 2**30)])
def test_counts_take_binary_suffixes(text, value):
    assert parse_count(text) == value
