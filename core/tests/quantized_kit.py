"""What a running model holds of a quantized checkpoint's matrices, and tensors and folders for those who read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from anychip import LLM
from anychip.layers.linear import _PackedLinear
from anychip.layers.ordered_linear import InOrder


def products(llm: LLM) -> dict[str, _PackedLinear]:
    """By checkpoint module: the layer that holds it, and the rows it has there."""
    found = {}
    for index, layer in enumerate(llm.engine.executor.worker.program.model.layers):
        found[f"model.layers.{index}.self_attn.o_proj"] = layer.attention.output
        found[f"model.layers.{index}.mlp.down_proj"] = layer.mlp.down
        for packed, parts in (
            (layer.attention.qkv, {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}),
            (layer.mlp.gate_up, {"gate": "mlp.gate_proj", "up": "mlp.up_proj"}),
        ):
            for part, module in parts.items():
                found[f"model.layers.{index}.{module}"] = (packed, part)
    return found


def held_matrix(layer: object) -> torch.Tensor:
    layer, part = layer if isinstance(layer, tuple) else (layer, "all")
    place = next(p for p in layer.kernel.spec.parts if p.name == part)
    rows = slice(place.offset, place.offset + place.rows)
    if isinstance(layer.packed, InOrder):
        return layer.packed.inner.matrix.dequantize()[rows][:, layer.packed.order.argsort()]
    return layer.packed.matrix.dequantize()[rows]


class Held:
    """plugin_api.WeightView over a tensor."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.source, self.tensor = name, tensor
        self.shape, self.dtype, self.nbytes = tuple(tensor.shape), tensor.dtype, tensor.nbytes

    def read(self, *bounds: tuple[int, int]) -> torch.Tensor:
        return self.tensor[tuple(slice(*bound) for bound in bounds)]


def spoil(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object] | None, settings: Mapping[str, object]
) -> None:
    """Changes the tensors of a checkpoint in one file, and what its config.json says of its quantization."""
    weights, description = folder / "model.safetensors", folder / "config.json"
    if change is not None:
        tensors = load_file(weights)
        change(tensors)
        save_file(tensors, weights)
    config = json.loads(description.read_text())
    config["quantization_config"] |= settings
    description.write_text(json.dumps(config))
