"""Errors of a model's layers on one device against another, each device in a process of its own (layerwise.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
from safetensors.torch import load_file
from torch import Tensor

from anychip.config import EngineConfig
from anychip.errors import DeviceUnavailable
from anychip.model_config import load_model_config
from anychip_conformance.layerwise import LOGITS, Recording
from anychip_conformance.oracle.streams import stream_bound


class LayerError(msgspec.Struct, frozen=True, kw_only=True):
    """`own`: fed with the other device's input; `gathered`: with its own. None for the logits, which are not fed."""

    name: str
    own: float | None
    gathered: float
    bound: float

    @property
    def beyond(self) -> bool:
        error = self.gathered if self.own is None else self.own
        return not error <= self.bound  # NaN is beyond


def compare(
    config: EngineConfig, device: str, options: dict[str, str], against: str, tokens: list[int], folder: Path
) -> list[LayerError]:
    """Records B, then A fed with B, then A by itself, into files of `folder`. Raises DeviceUnavailable with the last
    line of what went wrong."""

    def recorded(name: str, which: str, given: dict[str, str], fed: str = "") -> str:
        out = str(folder / f"{name}.safetensors")
        task = Recording(
            device=which, options=given, model=config.model, dtype=config.dtype, tokens=tokens, out=out, fed=fed
        )
        command = [sys.executable, "-m", "anychip_conformance.layerwise"]
        done = subprocess.run(command, input=msgspec.json.encode(task), stderr=subprocess.PIPE)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
            raise DeviceUnavailable(f"running the model on {which} failed: {lines[-1]}")
        return out

    trusted = recorded("trusted", against, {})
    own = load_file(recorded("own", device, options, trusted))
    gathered = load_file(recorded("gathered", device, options))
    return errors(load_file(trusted), own, gathered, load_model_config(config.model).hidden_size, config.dtype)


def errors(
    trusted: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    gathered: Mapping[str, Tensor],
    hidden_size: int,
    dtype: str,
) -> list[LayerError]:
    """By layer, in order, and of the logits at last."""
    count = sum(name.startswith("hidden.") for name in trusted)
    rows = [
        LayerError(
            name=f"layer {layer}",
            own=_relative(_stream(own, layer), _stream(trusted, layer)),
            gathered=_relative(_stream(gathered, layer), _stream(trusted, layer)),
            bound=stream_bound(1, hidden_size, dtype),
        )
        for layer in range(count)
    ]
    last = _relative(gathered[LOGITS].double(), trusted[LOGITS].double())
    bound = stream_bound(max(1, count), hidden_size, dtype)
    return [*rows, LayerError(name=LOGITS, own=None, gathered=last, bound=bound)]


def _stream(found: Mapping[str, Tensor], layer: int) -> Tensor:
    """The residual stream after a layer, [num_tokens, hidden_size]."""
    return found[f"hidden.{layer}"].double() + found[f"residual.{layer}"].double()


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
