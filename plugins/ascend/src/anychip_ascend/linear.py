"""Matrix products through the vendor's ops: dense in FRACTAL_NZ, W8A8, and weights of 8 or 4 bits under plain
activations.

Weights of the quantized products lie as [in_features, out_features], which the ops read fastest; parts of a matrix are
columns there. Source: the documents of npu_format_cast, npu_quant_matmul and npu_weight_quant_batchmatmul in the
torch_npu wheel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.ops.reference import DenseWeights, ReferenceLinear, WidenedLinear, can_widen, reference_linear
from anychip.plugin_api import LinearKernel, LinearSpec, Platform, Unsupported
from anychip_ascend.generations import Generation
from anychip_ascend.linear_choice import choose_linear
from anychip_ascend.runtime import TYPE_NUMBERS, npu, to_nd, to_nz

_INT4_ZERO = 8
"""Core's int4 is 0 to 15 with this zero; the vendor's is -8 to 7."""

_PER_INT32 = 8
"""Values of four bits in one of the vendor's int32."""


def linear_kernel(spec: LinearSpec, platform: Platform, generation: Generation, *, nz: bool) -> LinearKernel:
    """The kernel that linear_choice.py says."""
    choice = choose_linear(spec, generation, nz=nz)
    kernels: dict[str, Callable[[], LinearKernel]] = {
        "matmul": lambda: AscendLinear(spec, platform, nz=choice.nz),
        "npu_quant_matmul": lambda: TokenQuantLinear(spec, platform, nz=choice.nz),
        "npu_weight_quant_batchmatmul": lambda: WeightQuantLinear(spec, platform),
        "widened": lambda: WidenedLinear(
            spec, platform, lambda plain: linear_kernel(plain, platform, generation, nz=nz)
        ),
        "reference": lambda: reference_linear(spec, platform),
    }
    assert choice.op != "widened" or (spec.scheme is not None and can_widen(spec.scheme))
    return kernels[choice.op]()


class AscendLinear(ReferenceLinear):
    """Dense. Weights are loaded in the plain layout and turned into FRACTAL_NZ when they are complete."""

    def __init__(self, spec: LinearSpec, platform: Platform, *, nz: bool) -> None:
        super().__init__(spec, platform)
        self._nz = nz
        self.name = "ascend matmul" + (" (FRACTAL_NZ)" if nz else "")

    def finish(self, packed: DenseWeights) -> DenseWeights:
        if self._nz:
            packed.weight = to_nz(packed.weight)
        return packed

    def adopt(self, weight: Tensor) -> DenseWeights:
        """Shared with the embedding, which reads rows of it: in the plain layout, as it is."""
        return DenseWeights(weight, None)

    def update(self, packed: DenseWeights, part: str, tensor: Tensor, *, row: int = 0) -> None:
        """Blocks of FRACTAL_NZ hold rows of several parts: the matrix is laid out anew, into the same storage."""
        if not self._nz or part.endswith(".bias"):
            self.load(packed, part, tensor, row=row)
            return
        plain = DenseWeights(to_nd(packed.weight), packed.bias)
        self.load(plain, part, tensor, row=row)
        packed.weight.copy_(to_nz(plain.weight))

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        result = F.linear(x, packed.weight, packed.bias)
        return result if out is None else out.copy_(result)


@dataclass(slots=True)
class TransposedWeights:
    """`weight` [in_features, out_features], or in_features by out_features / 8 where an int32 holds eight values."""

    weight: Tensor
    scale: Tensor  # [out_features], or [groups, out_features]
    offset: Tensor | None  # as scale; is added to the weights before they are scaled
    bias: Tensor | None


class _Transposed(LinearKernel):
    """What both quantized products share: parts are columns, scales of whole parts come once."""

    def __init__(self, spec: LinearSpec, platform: Platform) -> None:
        super().__init__(spec, platform)
        self._parts = {part.name: part for part in spec.parts}

    def begin(self) -> TransposedWeights:
        spec, scheme = self.spec, self.spec.scheme
        assert scheme is not None
        groups = -(-spec.in_features // scheme.group_size) if scheme.group_size else 1
        shape = (spec.in_features, spec.out_features)
        zeros = self._empty((groups, spec.out_features), "float32") if scheme.zero_points else None
        return TransposedWeights(
            # Values of four bits are eight to an int32 once they are all there; till then a byte holds each.
            weight=self._empty(shape, "int8"),
            scale=self._empty((groups, spec.out_features), "float32"),
            offset=zeros,
            bias=self._empty((spec.out_features,), spec.dtype) if spec.bias else None,
        )

    def _empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return self.platform.empty(shape, dtype, "weights")

    def load(self, packed: TransposedWeights, part: str, tensor: Tensor, *, row: int = 0) -> None:
        name, _, kind = part.partition(".")
        place = self._parts[name]
        columns = slice(place.offset, place.offset + place.rows)
        if kind == "bias":
            assert packed.bias is not None, f"{part}: the spec has no bias"
            packed.bias[columns].copy_(tensor)
        elif kind == "":
            first = place.offset + row
            values = tensor.to(packed.weight.device)
            if self.spec.scheme is not None and self.spec.scheme.bits == 4:
                values = values.to(torch.int8) - _INT4_ZERO
            packed.weight[:, first : first + len(tensor)].copy_(values.T)
        else:
            assert kind in ("scale", "zero"), kind
            target = packed.scale if kind == "scale" else packed.offset
            assert target is not None
            target[:, columns].copy_(self._by_column(tensor.to(target.device).float(), place.rows))

    def _by_column(self, tensor: Tensor, rows: int) -> Tensor:
        """Scales of one part as [groups, rows]: core has them by row and group, or one for all rows."""
        groups = tensor.numel() // rows if tensor.numel() >= rows else tensor.numel()
        wide = tensor.reshape(-1, groups) if tensor.numel() >= rows else tensor.reshape(1, 1)
        return wide.expand(rows, -1).T if len(wide) == 1 else wide.T


class TokenQuantLinear(_Transposed):
    """int8 weights and activations, each row of which is rounded by a scale of its own."""

    def __init__(self, spec: LinearSpec, platform: Platform, *, nz: bool) -> None:
        super().__init__(spec, platform)
        self._nz = nz
        self.name = "ascend npu_quant_matmul" + (" (FRACTAL_NZ)" if nz else "")

    def finish(self, packed: TransposedWeights) -> TransposedWeights:
        packed.scale = packed.scale[0].contiguous()
        if self._nz:
            packed.weight = to_nz(packed.weight)
        return packed

    def update(self, packed: TransposedWeights, part: str, tensor: Tensor, *, row: int = 0) -> None:
        weight = to_nd(packed.weight) if self._nz else packed.weight
        view = TransposedWeights(weight, packed.scale.unsqueeze(0), None, packed.bias)
        self.load(view, part, tensor, row=row)
        if self._nz and "." not in part:
            packed.weight.copy_(to_nz(weight))

    def apply(self, x: Tensor, packed: TransposedWeights, *, out: Tensor | None = None) -> Tensor:
        if not len(x):
            return x.new_empty((0, self.spec.out_features)) if out is None else out
        values, scales = npu.npu_dynamic_quant(x.contiguous())
        result: Tensor = npu.npu_quant_matmul(
            values, packed.weight, packed.scale, pertoken_scale=scales, bias=packed.bias,
            output_dtype=TYPE_NUMBERS[x.dtype],
        )  # fmt: skip
        return result if out is None else out.copy_(result)


class WeightQuantLinear(_Transposed):
    """Weights of 8 or 4 bits, widened within the product; activations are plain."""

    name = "ascend npu_weight_quant_batchmatmul"

    def finish(self, packed: TransposedWeights) -> TransposedWeights:
        spec, scheme = self.spec, self.spec.scheme
        assert scheme is not None
        dtype = getattr(torch, spec.dtype)
        packed.scale = packed.scale.to(dtype)
        if packed.offset is not None:
            packed.offset = (_INT4_ZERO - packed.offset).to(dtype)
        if scheme.bits == 4:
            packed.weight = npu.npu_convert_weight_to_int4pack(packed.weight.to(torch.int32))
        if packed.bias is not None and dtype == torch.bfloat16:
            packed.bias = packed.bias.float()  # the op's rule
        return packed

    def update(self, packed: TransposedWeights, part: str, tensor: Tensor, *, row: int = 0) -> None:
        raise Unsupported(self.name, ["its weights are packed for good: Capabilities.reload covers plain ones"])

    def apply(self, x: Tensor, packed: TransposedWeights, *, out: Tensor | None = None) -> Tensor:
        scheme = self.spec.scheme
        assert scheme is not None
        if not len(x):
            return x.new_empty((0, self.spec.out_features)) if out is None else out
        result: Tensor = npu.npu_weight_quant_batchmatmul(
            x.contiguous(), packed.weight, packed.scale, packed.offset, None, None, packed.bias,
            scheme.group_size or 0,
        )  # fmt: skip
        return result if out is None else out.copy_(result)
