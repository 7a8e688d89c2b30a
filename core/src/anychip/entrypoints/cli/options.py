"""Command-line options that build an EngineConfig, shared by serve, generate and chat."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from anychip.config import EngineConfig, Environment
from anychip.errors import ConfigError
from anychip.types import QUICKSTART

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def add_engine_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    """Every option's destination is a field of EngineConfig; unset ones keep its default."""
    unset = argparse.SUPPRESS
    parser.add_argument(
        "model", nargs="?", default=QUICKSTART, help="checkpoint folder or hub repository (default: the embedded one)"
    )
    device = parser.add_argument_group("device")
    device.add_argument("--device", default=environment.device, help="auto, NAME or NAME:INDEX")
    device.add_argument(
        "--device-opt", dest="device_options", action="append", default=[], metavar="KEY=VALUE",
        help="an option of the device's plugin; `anychip devices` lists them",
    )  # fmt: skip
    device.add_argument("--tensor-parallel-size", type=int, default=unset)
    device.add_argument("--executor", choices=["auto", "inline", "multiprocess"], default=unset)
    device.add_argument("--require-native", action="store_true", default=unset, help="refuse reference ops")
    model = parser.add_argument_group("model")
    model.add_argument("--served-model-name", default=unset)
    model.add_argument("--tokenizer", default=unset, help="folder of the tokenizer, where it is not the model's")
    model.add_argument("--skip-tokenizer", action="store_true", default=unset, help="token ids in and out")
    model.add_argument("--dtype", default=unset, help="auto, float32, bfloat16, ...")
    model.add_argument("--revision", default=unset, help="branch, tag or commit of a hub repository")
    model.add_argument("--model-impl", choices=["auto", "native", "transformers"], default=unset)
    model.add_argument(
        "--trust-remote-code", action="store_true", default=unset, help="run modelling code that lies in the checkpoint"
    )
    model.add_argument("--quantization", default=unset, help="int8 or int4 at load; or the checkpoint's own method")
    model.add_argument("--kv-cache-dtype", default=unset, help="auto, fp8, int8, bfloat16, ...")
    model.add_argument(
        "--generation-config",
        choices=["auto", "none"],
        default=unset,
        help="whether generation_config.json's sampling is the default",
    )
    model.add_argument("--load-format", choices=["safetensors", "dummy"], default=unset)
    model.add_argument("--max-model-len", type=parse_count, default=unset)
    memory = parser.add_argument_group("memory")
    memory.add_argument("--memory-fraction", type=float, default=unset)
    memory.add_argument("--kv-cache-bytes", type=parse_count, default=unset, metavar="BYTES", help="such as 4G")
    memory.add_argument("--num-kv-blocks", type=int, default=unset)
    memory.add_argument("--block-size", type=int, default=unset)
    memory.add_argument("--no-prefix-caching", dest="prefix_caching", action="store_false", default=unset)
    schedule = parser.add_argument_group("scheduling")
    schedule.add_argument("--max-num-seqs", type=int, default=unset)
    schedule.add_argument("--max-num-batched-tokens", type=parse_count, default=unset)
    schedule.add_argument("--policy", default=unset, help="fcfs, priority, fair, predictive, or a plugin's")
    schedule.add_argument(
        "--speculate",
        default=unset,
        help="what drafts tokens: ngram, suffix, auto, draft:MODEL, eagle:HEAD, medusa:HEADS, or a plugin's",
    )
    schedule.add_argument("--max-drafts", type=int, default=unset, help="tokens drafted behind a sequence in one step")
    schedule.add_argument("--pooling", action="store_true", default=unset, help="serve vectors of prompts as well")
    schedule.add_argument("--max-embeddings", type=parse_count, default=unset, help="tokens that may bring embeddings")
    schedule.add_argument("--no-overlap", dest="overlap", action="store_false", default=unset)
    schedule.add_argument("--seed", type=int, default=unset)
    schedule.add_argument("--step-timeout-s", type=float, default=unset, help="a step that takes longer is a hang")
    schedule.add_argument("--start-timeout-s", type=float, default=unset, help="so is a start without progress")


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """Raises ConfigError."""
    values: dict[str, Any] = {
        name: value for name, value in vars(arguments).items() if name in EngineConfig.__struct_fields__
    }
    values["device_options"] = parse_device_options(arguments.device_options)
    return EngineConfig(**values)


def engine_arguments(config: EngineConfig) -> list[str]:
    """The command line that makes this configuration: what differs from the defaults."""
    defaults, arguments = EngineConfig(), [config.model]
    for name in config.__struct_fields__:
        value = getattr(config, name)
        if name == "model" or value == getattr(defaults, name):
            continue
        option = name.replace("_", "-")
        if name == "device_options":
            arguments += [f"--device-opt={key}={text}" for key, text in value.items()]
        elif value is False:
            arguments.append(f"--no-{option}")
        else:
            arguments.append(f"--{option}" if value is True else f"--{option}={value}")
    return arguments


def parse_count(text: str) -> int:
    """An integer with an optional binary suffix: 4096, 4k, 2G."""
    match = re.fullmatch(r"(\d+)([kmgt]?)i?b?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count such as 4096, 4k or 2G")
    return int(match[1]) * _UNITS[match[2]]


def parse_device_options(texts: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE of every --device-opt. Raises ConfigError."""
    return dict(_pair(text) for text in texts)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--device-opt {text!r} is not KEY=VALUE")
    return key, value
