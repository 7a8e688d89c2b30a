"""A plain checkpoint in, a compressed-tensors checkpoint out.

Without texts every matrix is rounded to nearest, as it is read. With texts the decoder layers are taken in order, each
over what the rounded layers before it give. Embeddings, the head and routers stay as they are, and so do norms, but for
what smoothing moves into them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor

from anychip.compress.by_layer import CalibratedLayer, LayerByLayer
from anychip.compress.gptq import Moments, gptq
from anychip.compress.rounding import Rounded, round_to_nearest
from anychip.compress.smoothing import smooth
from anychip.compress.targets import KV_SCHEMES, Target
from anychip.compress.writer import ShardWriter
from anychip.errors import CheckpointError, ConfigError, Unsupported
from anychip.ops.reference.quantized import INT8_MAX
from anychip.plugin_api import FP8_MAX
from anychip.quantization.gptq import INT8_OFFSET
from anychip.quantization.packing import pack
from anychip.weight_files import INDEX
from anychip.weights.checkpoint import Checkpoint
from anychip.weights.new_checkpoint import copy_beside_weights, new_checkpoint

Progress = Callable[[int, int], None]
"""Is told how many matrices are done, of how many."""

Method = Literal["rtn", "gptq", "awq", "smoothquant"]
"""smoothquant: its factors, and then GPTQ."""

KVScales = Literal["fp8", "int8"]
_LEAST_SCALE = 1e-12

_EXPERT = re.compile(r"\.experts\.\d+\.")


class MatrixReport(msgspec.Struct, frozen=True, kw_only=True):
    """Errors are relative: norm of the difference over norm of the plain one."""

    method: str
    weight_error: float
    output_error: float | None
    """Of the products over the calibration texts; None without any."""


def quantize(
    source: Path,
    out: Path,
    target: Target,
    method: Method,
    texts: Sequence[Tensor],
    device: torch.device,
    progress: Progress,
    kv_scales: KVScales | None = None,
) -> dict[str, MatrixReport]:
    """Writes folder `out` whole or not at all, and returns what became of each matrix. Raises ConfigError where `out`
    is there or the source is quantized, CheckpointError and Unsupported for what cannot be read."""
    config = _plain_config(source)
    with new_checkpoint(out) as partial:
        job = _Job(Checkpoint(source), ShardWriter(partial), target, method, device, progress)
        job.run(texts, kv_scales)
        config["quantization_config"] = job.target.config(job.ignored) | (
            {} if kv_scales is None else {"kv_cache_scheme": dict(KV_SCHEMES[kv_scales])}
        )
        (partial / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))
        copy_beside_weights(source, partial, but={INDEX})
    return job.reports


def _plain_config(source: Path) -> dict[str, object]:
    try:
        config: dict[str, object] = msgspec.json.decode((source / "config.json").read_bytes(), type=dict)
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{source / 'config.json'} cannot be read: {error}") from error
    if config.get("quantization_config"):
        raise ConfigError(f"{source} is quantized already; give the plain checkpoint that it was made from")
    return config


class _Job:
    def __init__(
        self,
        checkpoint: Checkpoint,
        writer: ShardWriter,
        target: Target,
        method: Method,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._checkpoint, self._writer, self._method = checkpoint, writer, method
        self._device, self._progress = device, progress
        self._model = LayerByLayer(checkpoint, device)
        linears = set(self._model.linear_names()) | self._experts()
        columns = {name: checkpoint.shape(f"{name}.weight")[1] for name in linears}
        self.target = target.grouped(columns.values())
        self._names = [name for name in sorted(linears) if self.target.fits(columns[name])]
        self.ignored = sorted((linears - set(self._names)) | {"lm_head"})
        self.reports: dict[str, MatrixReport] = {}
        if not self._names:
            raise Unsupported(
                f"quantization to {target.scheme.name}",
                [f"no linear layer of {self._model.name} fits: their columns are {sorted({*columns.values()})}"],
            )

    def run(self, texts: Sequence[Tensor], kv_scales: KVScales | None) -> None:
        """Writes every tensor, quantized or as it is."""
        wanted = set(self._names)
        changed: dict[str, Tensor] = {}
        if self._method != "rtn" or kv_scales is not None:
            for layer in self._model.calibrated(texts):
                if self._method in ("awq", "smoothquant"):
                    changed |= smooth(layer, wanted, self.target.scheme, awq=self._method == "awq")
                if kv_scales is not None:
                    self._write_kv_scales(layer, kv_scales)
                for name in [name for name in layer.linears if name in wanted]:
                    linear = layer.linears[name]
                    linear.weight.copy_(self._round(name, linear.weight, layer.seen.moments.get(name)))
                    wanted.discard(name)
        for name in sorted(wanted):
            self._round(name, self._checkpoint.read(f"{name}.weight").to(self._device), None)
        quantized = {f"{name}.weight" for name in self._names}
        for name in sorted(self._checkpoint.names - quantized):
            self._writer.add(name, changed[name] if name in changed else self._checkpoint.read(name))
        self._writer.close()

    def _write_kv_scales(self, layer: CalibratedLayer, kind: KVScales) -> None:
        """One for the layer in fp8, whose range is wide; one for each head in int8."""
        for name, found in layer.greatest_kv.items():
            for which, magnitudes in zip(("k_scale", "v_scale"), found, strict=True):
                scale = magnitudes.max().view(1) / FP8_MAX if kind == "fp8" else magnitudes / INT8_MAX
                self._writer.add(f"{name}.{which}", scale.clamp(min=_LEAST_SCALE))

    def _round(self, name: str, weight: Tensor, moments: Moments | None) -> Tensor:
        """Writes a matrix, and returns what is stored of it."""
        scheme = self.target.scheme
        if moments is None or not moments.count or self._method == "rtn":
            method, rounded = "rtn", round_to_nearest(weight, scheme)
        elif self._method == "awq":
            method, rounded = "awq", round_to_nearest(weight, scheme)
        else:
            method, rounded = self._method, gptq(weight, moments.sum, scheme)
        found = rounded.dequantize()
        error = found - weight.float()
        output_error = None
        if moments is not None and moments.count:
            output_error = (_norm(error, moments.sum) / _norm(weight.float(), moments.sum)).item()
        for suffix, tensor in self._parts(rounded).items():
            self._writer.add(f"{name}.{suffix}", tensor)
        self.reports[name] = MatrixReport(
            method=method, weight_error=(error.norm() / weight.float().norm()).item(), output_error=output_error
        )
        self._progress(len(self.reports), len(self._names))
        return found

    def _parts(self, rounded: Rounded) -> dict[str, Tensor]:
        """compressed-tensors' tensors of a matrix. Scales stay float32: rounded with the model they would be others
        than those that the values were made for."""
        scale = rounded.scale if rounded.scale.dim() > 1 else rounded.scale.unsqueeze(-1)
        if self.target.container != "pack-quantized":
            return {"weight": rounded.values, "weight_scale": scale}
        bits, values = rounded.scheme.bits, rounded.values
        if bits == 8:
            values = (values.short() + INT8_OFFSET).to(torch.uint8)
        return {
            "weight_packed": pack(values, 1, bits),
            "weight_shape": torch.tensor(values.shape),
            "weight_scale": scale,
        }

    def _experts(self) -> set[str]:
        """Experts' matrices, which the library stacks."""
        return {
            name.removesuffix(".weight")
            for name in self._checkpoint.names
            if _EXPERT.search(name) and name.endswith(".weight") and len(self._checkpoint.shape(name)) == 2
        }


def _norm(matrix: Tensor, moments: Tensor) -> Tensor:
    """Of matrix x over inputs of these moments."""
    return ((matrix @ moments) * matrix).sum().clamp(min=0).sqrt()
