"""Command-line options that build an EngineConfig, shared by serve, generate and chat."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from anychip.config import ADAPTER_TARGETS, EngineConfig
from anychip.environment import Environment
from anychip.errors import ConfigError
from anychip.prompt_extras import POOLING_KINDS
from anychip.tasks.served import TASKS
from anychip.types import QUICKSTART

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def add_engine_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    """Every option's destination is a field of EngineConfig; unset ones keep its default."""
    unset = argparse.SUPPRESS
    parser.add_argument(
        "model",
        nargs="?",
        default=QUICKSTART,
        help="checkpoint folder, GGUF file, or hub repository (default: the embedded one)",
    )
    device = parser.add_argument_group("device")
    device.add_argument("--device", default=environment.device, help="auto, NAME or NAME:INDEX")
    device.add_argument(
        "--device-opt", dest="device_options", action="append", default=[], metavar="KEY=VALUE",
        help="an option of the device's plugin; `anychip devices` lists them",
    )  # fmt: skip
    device.add_argument("--tensor-parallel-size", type=int, default=unset, help="ranks that share every layer")
    device.add_argument("--pipeline-parallel-size", type=int, default=unset, help="stages of whole layers")
    device.add_argument(
        "--pipeline-layers", type=parse_sizes, default=unset, metavar="N,N", help="layers of each stage, first to last"
    )
    device.add_argument(
        "--data-parallel-size", type=int, default=unset, help="lanes, each with ranks and requests of its own"
    )
    device.add_argument(
        "--context-parallel-size", type=int, default=unset, help="ranks that share the keys of every sequence"
    )
    device.add_argument(
        "--expert-parallel", action="store_true", default=unset, help="ranks hold whole experts, not slices of all"
    )
    device.add_argument(
        "--eplb-interval",
        type=parse_count,
        default=unset,
        metavar="STEPS",
        help="steps between looks at the experts' load, after which some move to other ranks",
    )
    device.add_argument(
        "--num-redundant-experts",
        type=parse_count,
        default=unset,
        metavar="N",
        help="slots for copies of busy experts, over all ranks",
    )
    device.add_argument("--executor", choices=["auto", "inline", "multiprocess", "ray"], default=unset)
    device.add_argument(
        "--nodes",
        type=parse_names,
        default=unset,
        metavar="HOST,HOST",
        help="hosts that share the ranks, this one first",
    )
    device.add_argument("--node-port", type=int, default=unset, help="where `anychip join` finds this host")
    device.add_argument("--cluster-key", default=unset, metavar="FILE", help="the secret that all nodes have")
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
    model.add_argument("--quantization", default=unset, help="int8, int4, fp8 or mxfp4 at load, or its own")
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
        help="what drafts tokens: ngram, suffix, auto, draft:MODEL, eagle:HEAD, medusa:HEADS, mtp, or a plugin's",
    )
    schedule.add_argument("--max-drafts", type=int, default=unset, help="tokens drafted behind a sequence in one step")
    model.add_argument("--task", choices=["auto", *TASKS], default=unset, help="what is served, where the files err")
    model.add_argument(
        "--vector-pooling",
        choices=POOLING_KINDS,
        default=unset,
        help="where the files do not say how vectors are made",
    )
    model.add_argument(
        "--vector-dimensions", type=parse_sizes, default=unset, metavar="N,N", help="sizes to which vectors may be cut"
    )
    schedule.add_argument("--pooling", action="store_true", default=unset, help="serve vectors of prompts as well")
    schedule.add_argument("--max-embeddings", type=parse_count, default=unset, help="tokens that may bring embeddings")
    adapters = parser.add_argument_group("adapters")
    adapters.add_argument(
        "--adapter", dest="adapters", action="append", default=[], metavar="NAME=FOLDER",
        help="a LoRA adapter in PEFT's form, which requests ask for as their model; repeatable",
    )  # fmt: skip
    adapters.add_argument("--max-adapters", type=int, default=unset, help="adapters that a step may hold")
    adapters.add_argument("--max-adapter-rank", type=int, default=unset, help="the largest rank of one")
    adapters.add_argument(
        "--adapter-targets", type=parse_names, default=unset, metavar="NAME,NAME",
        help=f"what adapters may change: {', '.join(ADAPTER_TARGETS)}",
    )  # fmt: skip
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
    values["adapters"] = parse_adapters(arguments.adapters)
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
        elif name == "adapters":
            arguments += [f"--adapter={key}={folder}" for key, folder in value.items()]
        elif isinstance(value, tuple):
            arguments.append(f"--{option}={','.join(map(str, value))}")
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


def parse_names(text: str) -> tuple[str, ...]:
    """Names between commas."""
    return tuple(name.strip() for name in text.split(","))


def parse_sizes(text: str) -> tuple[int, ...]:
    """Numbers with commas between them."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sizes such as 256,512")
    return found


def parse_device_options(texts: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE of every --device-opt. Raises ConfigError."""
    return dict(_pair(text, "--device-opt", "KEY=VALUE") for text in texts)


def parse_adapters(texts: Sequence[str]) -> dict[str, str]:
    """NAME=FOLDER of every --adapter. Raises ConfigError, also for two of one name."""
    found: dict[str, str] = {}
    for name, folder in (_pair(text, "--adapter", "NAME=FOLDER") for text in texts):
        if not name or not folder:
            raise ConfigError(f"--adapter {name}={folder} is not NAME=FOLDER")
        if name in found:
            raise ConfigError(f"--adapter {name} is given twice, for {found[name]} and {folder}; names differ")
        found[name] = folder
    return found


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{option} {text!r} is not {form}")
    return key, value
