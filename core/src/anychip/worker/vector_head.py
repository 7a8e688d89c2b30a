"""What makes of pooled vectors what is served: a classifier's labels, or the dense layers behind sentence-transformers'
pooling. It runs on the host, in float32: a few thousand numbers by request, the same on every device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.errors import CheckpointError
from anychip.plugin_api import WeightView
from anychip.tasks.served import ServedTask, Stage
from anychip.weights.checkpoint import Checkpoint
from anychip.weights.files import SafetensorsFile

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x, "tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu, "silu": F.silu,
    "sigmoid": torch.sigmoid,
}  # fmt: skip


class VectorHead:
    """`tensors` by stage: its weight, and its bias or None; float32."""

    def __init__(self, stages: tuple[Stage, ...], tensors: list[tuple[Tensor, Tensor | None]]) -> None:
        self._layers = list(zip(stages, tensors, strict=True))

    @torch.inference_mode()
    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """[num_vectors, size] of pooled ones [num_vectors, hidden_size]; float32."""
        x = torch.from_numpy(vectors)
        for stage, (weight, bias) in self._layers:
            if stage.norm_eps is not None:
                x = F.layer_norm(x, weight.shape, weight, bias, stage.norm_eps)
                continue
            y = _ACTIVATIONS[stage.activation](F.linear(x, weight, bias))
            x = x + y if stage.residual else y
        found: np.ndarray = x.numpy()
        return found


def load_head(served: ServedTask, folder: Path) -> VectorHead | None:
    """None: pooled vectors are served as they are. Raises CheckpointError for a tensor that is not there, and for one
    that does not fit those before it."""
    if not served.stages:
        return None
    names = [(stage.file, name) for stage in served.stages for name in (stage.weight, stage.bias) if name is not None]
    rows = {(stage.file, stage.weight): stage.rows for stage in served.stages}
    found = _read(folder, names, rows)
    tensors = []
    for stage in served.stages:
        bias = None if stage.bias is None else found[stage.file, stage.bias]
        tensors.append((found[stage.file, stage.weight], bias))
    size = len(tensors[-1][0])
    if size != served.size:
        raise CheckpointError(f"{folder}: the head's last layer gives {size} numbers, its files say {served.size}")
    return VectorHead(served.stages, tensors)


def _read(
    folder: Path, wanted: list[tuple[str, str]], rows: Mapping[tuple[str, str], tuple[int, ...]]
) -> Mapping[tuple[str, str], Tensor]:
    """`rows` as Stage has them, where not all of a tensor counts."""
    found: dict[tuple[str, str], Tensor] = {}
    own = {name for file, name in wanted if not file}
    if own:
        for name, view in Checkpoint(folder).views():
            if name in own:
                found["", name] = _rows(view, rows.get(("", name), ()))
    for path in {file for file, _ in wanted if file}:
        file = SafetensorsFile(folder / path)
        try:
            for name, view in file.views():
                found[path, name] = view.read().float()
        finally:
            file.close()
    for path, name in wanted:
        if (path, name) not in found:
            raise CheckpointError(f"{folder / path} lacks tensor {name!r}, which the head of its vectors needs")
    return found


def _rows(view: WeightView, rows: tuple[int, ...]) -> Tensor:
    """float32."""
    if not rows:
        return view.read().float()
    if max(rows) >= view.shape[0]:
        raise CheckpointError(f"{view.source} has {view.shape[0]} rows, and the score is that of token {max(rows)}")
    first, *less = [view.read((row, row + 1)).float() for row in rows]
    return first - less[0] if less else first
