"""A model's layers on one device, recorded one by one; and the same layers fed with what another device recorded.

`python -m anychip_conformance.layerwise` is one device's process of `anychip diff-numerics`: it reads a Recording from
standard input and writes tensors to a safetensors file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anychip.config import EngineConfig
from anychip.errors import Unsupported
from anychip.model_config import load_model_config
from anychip.plugin_api import ForwardContext, Mesh, MeshShape
from anychip.types import cdiv
from anychip.worker.kv_plan import plan_kv
from anychip.worker.model_source import CheckpointSource
from anychip_conformance.batch import Padding, Row, paged_batch
from anychip_conformance.device import Device, open_device
from anychip_conformance.program_scores import record_program

LOGITS = "logits"


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """What to record: `tokens` of `model` (a folder) in `dtype`, into `out`. `fed` is the file of another recording,
    whose layers' inputs are given to this device's layers; empty: each layer gets what the one before it gave."""

    device: str
    options: dict[str, str]
    model: str
    dtype: str
    tokens: list[int]
    out: str
    fed: str = ""


class Tap:
    """Stands in a model's list of layers: records what comes out, and may replace what goes in."""

    def __init__(
        self, layer: Any, index: int, num_tokens: int, kept: dict[str, Tensor], fed: dict[str, Tensor]
    ) -> None:
        self._layer, self._index, self._num_tokens, self._kept, self._fed = layer, index, num_tokens, kept, fed
        self.attention = layer.attention

    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        if self._fed and self._index:
            hidden, residual = (self._given(name, hidden) for name in ("hidden", "residual"))
        hidden, residual = self._layer(hidden, residual, context)
        self._kept[f"hidden.{self._index}"] = hidden[: self._num_tokens].cpu().clone()
        self._kept[f"residual.{self._index}"] = residual[: self._num_tokens].cpu().clone()
        return hidden, residual

    def _given(self, name: str, like: Tensor) -> Tensor:
        """What the other device's layer before this one gave, padded as this device pads."""
        padded = torch.zeros_like(like)
        padded[: self._num_tokens] = self._fed[f"{name}.{self._index - 1}"].to(like)
        return padded


@torch.inference_mode()
def record(task: Recording) -> dict[str, Tensor]:
    """By name: hidden.N and residual.N as layer N gives them, and the logits of every token. Of a step program, what
    record_program gives."""
    device = open_device(task.device, task.options)
    if device.manifest.seam == "step":
        return record_program(device, task.model, task.dtype, task.tokens)
    config = EngineConfig(model=task.model, device=task.device, dtype=task.dtype, max_model_len=len(task.tokens))
    source = CheckpointSource(
        config=config, model=load_model_config(task.model), platform=device.platform, ops=device.ops, contributed={}
    )
    model: Any = source.build(Mesh.alone())
    kept: dict[str, Tensor] = {}
    fed = load_file(task.fed) if task.fed else {}
    if hasattr(model, "layers"):
        model.layers = [Tap(layer, index, len(task.tokens), kept, fed) for index, layer in enumerate(model.layers)]
    context, ids, positions = _prompt(device, source, model, task.tokens)
    hidden = model.forward(ids, positions, context)[: len(task.tokens)]
    kept[LOGITS] = model.logits(hidden).float().cpu()
    device.close()
    return kept


def _prompt(device: Device, source: CheckpointSource, model: Any, tokens: list[int]) -> tuple[ForwardContext, Any, Any]:
    """One prompt as a whole step: plans by KV group, caches by layer, ids and positions."""
    kv = plan_kv(source.attention_specs(MeshShape()), device.platform.cache_backend, None)
    if kv.states:
        raise Unsupported("diff-numerics", ["layers that keep a state are not taken apart yet"])
    plans: list[Any] = []
    caches: list[Any] = [None] * len(kv.layer_groups)
    make: Callable[..., Any] = device.platform.allocate
    for group, size in enumerate(kv.block_sizes):
        pages = cdiv(len(tokens), size)
        layers = [layer for layer, of in enumerate(kv.layer_groups) if of == group]
        batch = paged_batch(
            device,
            [Row(0, 0, len(tokens))],
            block_size=size,
            tables=[list(range(1, pages + 1))],
            padding=Padding(),
        )
        for layer in layers:
            raw = make((pages + 1) * kv.page_bytes, "kv")
            raw.zero_()
            caches[layer] = model.attention[layer].make_cache(raw, pages + 1, size)
        plans.append(model.attention[layers[0]].plan(batch.view, batch.key, group=group))
    padded = tokens + [0] * (batch.key.num_tokens - len(tokens))
    return ForwardContext(plans, caches, kv.layer_groups), device.tensor(padded, "int32"), batch.view.positions


def main() -> int:
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Recording)
    save_file({name: tensor.contiguous() for name, tensor in record(task).items()}, Path(task.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
