"""Matrix products: packed weights, the reference's arithmetic where no kernels were built, and heads that share the
embedding's storage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.plugin_api import LinearKernel, LinearSpec, Platform
from anychip_cpu.native import DTYPES, Kernels
from anychip_cpu.ops import CODES
from anychip_cpu.packing import Panels, described


@dataclass(slots=True)
class PackedLinear:
    held: Panels | Tensor
    """In panels; or plain [out_features, in_features], as the checkpoint has them."""
    bias: Tensor | None  # [out_features]
    plain: bool = False
    described: bytes = b""
    """kernels/weights.h's PackedWeights, once they are finished."""


class CpuLinear(LinearKernel):
    """Dense and quantized products with weights in panels."""

    def __init__(self, spec: LinearSpec, platform: Platform, kernels: Kernels, name: str) -> None:
        super().__init__(spec, platform)
        self.name = f"cpu-{name}"
        self.reads_rows = spec.scheme is not None and not spec.scheme.values.startswith("fp8")
        self._kernels = kernels
        self._parts = {part.name: slice(part.offset, part.offset + part.rows) for part in spec.parts}

    def begin(self) -> PackedLinear:
        spec = self.spec
        panels = Panels.allocate(self._kernels, spec.out_features, spec.in_features, spec.dtype, spec.scheme)
        bias = self.platform.empty((spec.out_features,), spec.dtype, "weights") if spec.bias else None
        return PackedLinear(panels, bias)

    def load(self, packed: PackedLinear, part: str, tensor: Tensor, *, row: int = 0) -> None:
        name, _, kind = part.partition(".")
        place = self._parts[name]
        if kind == "bias":
            assert packed.bias is not None, f"{part}: the spec has no bias"
            packed.bias[place].copy_(tensor)
        elif isinstance(packed.held, Panels):
            packed.held.put(kind, tensor, place, row=row)
        else:
            packed.held[place.start + row : place.start + row + len(tensor)].copy_(tensor)

    def finish(self, packed: PackedLinear) -> PackedLinear:
        assert isinstance(packed.held, Panels)
        packed.described = packed.held.described()
        return packed

    def adopt(self, weight: Tensor) -> PackedLinear:
        """Shares a plain weight's storage: its rows are read as they lie."""
        rows, columns = weight.shape
        return PackedLinear(weight, None, True, described(DTYPES[self.spec.dtype], rows, columns, weight.data_ptr(), 0))

    def rows(self, packed: PackedLinear, ids: Tensor) -> Tensor:
        ids = ids.to(torch.int64).contiguous()
        out = torch.empty((len(ids), self.spec.in_features), dtype=getattr(torch, self.spec.dtype))
        self._kernels.panel_rows(packed.described, ids.data_ptr(), len(ids), out.data_ptr(), DTYPES[self.spec.dtype])
        return out

    def apply(self, x: Tensor, packed: PackedLinear, *, out: Tensor | None = None) -> Tensor:
        rows, ldx = x.shape[0], x.stride(0)
        if x.stride(1) != 1:
            x, ldx = x.contiguous(), x.shape[1]
        result = x.new_empty((rows, self.spec.out_features)) if out is None or out.stride(1) != 1 else out
        dtype = CODES[x.dtype]
        bias = 0 if packed.bias is None else packed.bias.data_ptr()
        self._kernels.linear(
            packed.described, x.data_ptr(), dtype, rows, ldx, bias, result.data_ptr(), dtype, result.stride(0),
            packed.plain,
        )  # fmt: skip
        return result if out is None or result is out else out.copy_(result)
