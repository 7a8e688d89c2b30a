"""Errors of a model's layers on one device against another, each device in a process of its own (layerwise.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
from safetensors.torch import load_file
from torch import Tensor

from anychip.config import EngineConfig
from anychip.model_config import load_model_config
from anychip_conformance.device import manifest_of
from anychip_conformance.layerwise import LOGITS, Recording
from anychip_conformance.oracle.streams import stream_bound
from anychip_conformance.program_errors import LayerError, compare_programs, recorded


def compare(
    config: EngineConfig, device: str, options: dict[str, str], against: str, tokens: list[int], folder: Path
) -> list[LayerError]:
    """Records B, then A fed with B, then A by itself, into files of `folder`. A device of the step seam runs its whole
    program, which shows logits alone: program_errors.py looks for the layer. Raises DeviceUnavailable with the last
    line of what went wrong."""
    if "step" in (manifest_of(device).seam, manifest_of(against).seam):
        return compare_programs(config, device, options, against, tokens, folder)
    task = Recording(device=against, options={}, model=config.model, dtype=config.dtype, tokens=tokens, out="")
    trusted = recorded(task, folder / "trusted")
    task = msgspec.structs.replace(task, device=device, options=options)
    own = load_file(recorded(msgspec.structs.replace(task, fed=str(trusted)), folder / "own"))
    gathered = load_file(recorded(task, folder / "gathered"))
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
