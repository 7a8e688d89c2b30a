"""Errors of devices of which one runs whole compiled steps: its program is judged by the log-probabilities that it
gives. Where they are beyond their bound, models of the first layers alone show which layer brings the error."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
from safetensors.torch import load_file, save_file
from torch import Tensor

from anychip.config import EngineConfig
from anychip.errors import DeviceUnavailable
from anychip.model_config import load_model_config
from anychip.weight_files import weight_files
from anychip_conformance.layerwise import LOGITS, Recording
from anychip_conformance.oracle.streams import stream_bound
from anychip_conformance.program_scores import SINGLE, WHOLE

_LAYER = re.compile(r"\.(\d+)\.")
"""In a tensor's name, the layer that it belongs to."""
_SHOWN = {WHOLE: "logits of the prompt", SINGLE: "logits token by token"}


class LayerError(msgspec.Struct, frozen=True, kw_only=True):
    """`own`: fed with the other device's input; `gathered`: with its own. None where a layer cannot be fed, and for the
    logits."""

    name: str
    own: float | None
    gathered: float
    bound: float

    @property
    def beyond(self) -> bool:
        error = self.gathered if self.own is None else self.own
        return not error <= self.bound  # NaN is beyond


def recorded(task: Recording, place: Path) -> Path:
    """Runs a device's process; the file that it wrote. Raises DeviceUnavailable with what went wrong."""
    path = place.with_suffix(".safetensors")
    task = msgspec.structs.replace(task, out=str(path))
    command = [sys.executable, "-m", "anychip_conformance.layerwise"]
    done = subprocess.run(command, input=msgspec.json.encode(task), stderr=subprocess.PIPE)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
        raise DeviceUnavailable(f"running the model on {task.device} failed: {lines[-1]}")
    return path


def compare_programs(
    config: EngineConfig, device: str, options: dict[str, str], against: str, tokens: list[int], folder: Path
) -> list[LayerError]:
    """The errors of the whole model's log-probabilities; where one is beyond its bound, after the layers as well among
    which the first wrong one was found by halving."""

    def rows(model: Path) -> list[LayerError]:
        task = Recording(device=against, options={}, model=str(model), dtype=config.dtype, tokens=tokens, out="")
        trusted = load_file(recorded(task, folder / "trusted"))
        tried = load_file(recorded(msgspec.structs.replace(task, device=device, options=options), folder / "tried"))
        shape = load_model_config(str(model))
        bound = stream_bound(shape.num_layers, shape.hidden_size, config.dtype)
        return [
            LayerError(name=_SHOWN[how], own=None, gathered=error, bound=bound)
            for how, error in program_errors(tried, trusted).items()
        ]

    model = Path(config.model)
    found = rows(model)
    if not any(row.beyond for row in found):
        return found
    layers: dict[int, LayerError] = {}
    right, wrong = 0, load_model_config(config.model).num_layers  # numbers of layers
    while wrong - right > 1:
        count = (right + wrong) // 2
        worst = max(rows(first_layers(model, count, folder / f"first-{count}")), key=lambda row: row.gathered)
        layers[count - 1] = msgspec.structs.replace(worst, name=f"layer {count - 1}")
        right, wrong = (right, count) if worst.beyond else (count, wrong)
    layers.setdefault(wrong - 1, msgspec.structs.replace(found[0], name=f"layer {wrong - 1}"))
    return [*(layers[index] for index in sorted(layers)), *found]


def program_errors(tried: Mapping[str, Tensor], trusted: Mapping[str, Tensor]) -> dict[str, float]:
    """By how the tokens were computed: the root of the mean squared difference of log-probabilities, over that of the
    logits, so that it compares with errors of a residual stream."""
    found = {}
    for how in (WHOLE, SINGLE):
        program, other = (tried, trusted) if f"{how}.ids" in tried else (trusted, tried)
        ids, ours = program[f"{how}.ids"], program[f"{how}.logprobs"].double()
        if LOGITS in other:
            logits = other[LOGITS].double()[:-1][-len(ids) :]  # the last token is followed by none
            theirs, size = logits.log_softmax(-1).gather(1, ids), logits.square().mean().sqrt()
        else:  # of two programs, the tokens that both were asked for
            ours, theirs = ours[:, :1], other[f"{how}.logprobs"].double()[:, :1]
            size = theirs.square().mean().sqrt()
        found[how] = float((ours - theirs).square().mean().sqrt() / size)
    return found


def first_layers(model: Path, count: int, folder: Path) -> Path:
    """A checkpoint of a model's first layers and its head."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = count
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:count]
    (folder / "config.json").write_text(json.dumps(config))
    kept = {
        name: tensor
        for file in weight_files(model)
        for name, tensor in load_file(file.path).items()
        if (file.tensors is None or name in file.tensors) and _layer(name) < count
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _layer(name: str) -> int:
    """The layer of a tensor; -1: of none."""
    found = _LAYER.search(name)
    return -1 if found is None else int(found[1])
