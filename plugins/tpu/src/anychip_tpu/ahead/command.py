"""`anychip tpu-compile MODEL --topology v5e:2x4`: compiles a model's step programs for TPUs that are not here."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from anychip.plugin_api import ShapeKey
from anychip_tpu.ahead.libtpu import missing
from anychip_tpu.ahead.report import as_json, show
from anychip_tpu.ahead.topology import parse, quiet_libtpu


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder with config.json, or a name on the hub; weights are not read")
    parser.add_argument("--topology", required=True, help="a slice, such as v5e:2x4, v5p:2x2x1 or v6e:2x4")
    parser.add_argument("--tp", type=int, help="devices that share the model; all of the slice's, and no other number")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=1024)
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--context", type=int, default=1024, help="keys in each row's past, for estimates")
    parser.add_argument(
        "--buckets",
        choices=tuple(_CHOICES),
        default="all",
        help="decode: the largest step in which every row computes one token; largest: that and the largest of all",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0: every program compiles and fits; 1: one does not; 2: it cannot be tried."""
    try:
        topology = parse(arguments.topology)
    except ValueError as error:
        return _refuse(str(error))
    if arguments.tp not in (None, topology.num_devices):
        return _refuse(
            f"--tp {arguments.tp} on {topology}, which has {topology.num_devices} devices: a program is compiled for "
            "all of a slice; name a slice of as many devices"
        )
    if problem := missing():
        return _refuse(problem)
    quiet_libtpu()
    # Loads torch_xla, for which prepare_process sets what it reads as it starts.
    from anychip_tpu import MANIFEST
    from anychip_tpu.ahead import steps

    steps.prepare_process(topology)
    progress = Console(stderr=True)
    with progress.status("") as status:
        report = steps.compile_steps(
            MANIFEST,
            _settings(arguments),
            topology,
            context=arguments.context,
            choose=_CHOICES[arguments.buckets],
            got_on=status.update,
        )
    if arguments.json:
        sys.stdout.write(json.dumps(as_json(arguments.model, report), indent=2) + "\n")
    else:
        show(arguments.model, report, Console(highlight=False, soft_wrap=True))
    return 0 if report.good else 1


def decode(keys: Sequence[ShapeKey]) -> list[ShapeKey]:
    return [max((key for key in keys if key.num_tokens == key.num_reqs), key=_size)]


def largest(keys: Sequence[ShapeKey]) -> list[ShapeKey]:
    return list(dict.fromkeys([*decode(keys), max(keys, key=_size)]))


def _size(key: ShapeKey) -> tuple[int, int, int, int]:
    return key.num_tokens, key.num_reqs, key.num_samples, key.num_pages


_CHOICES: dict[str, Callable[[Sequence[ShapeKey]], Sequence[ShapeKey]]] = {
    "all": list,
    "decode": decode,
    "largest": largest,
}


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "dtype", "quantization", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size")
    return {name: getattr(arguments, name) for name in names}


def _refuse(problem: str) -> int:
    sys.stderr.write(f"anychip tpu-compile: {problem}\n")
    return 2
