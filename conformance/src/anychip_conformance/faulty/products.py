"""Faults of matrix products and of mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import DenseWeights, ExpertWeights
from anychip.ops.reference.linear import QuantizedWeights, ReferenceQuantizedLinear
from anychip.ops.reference.quantized import QuantizedMatrix, round_activations
from anychip.plugin_api import LinearKernel, LinearSpec, Platform, Routing
from anychip_conformance.faulty.plain import InvariantMoE, PlainLinear
from anychip_conformance.faulty.registry import fault

# -- dense products -------------------------------------------------------------------------------------------


@fault("linear-keeps-the-callers-buffer", "linear", killed_by="linear.dense.001")
class KeepsTheCallersBuffer(PlainLinear):
    """Loaded rows are remembered where they lie, and read after their storage was reused."""

    def begin(self) -> DenseWeights:
        self._views: list[tuple[int, Tensor]] = []
        return super().begin()

    def load(self, packed: DenseWeights, part: str, tensor: Tensor, *, row: int = 0) -> None:
        if part.endswith(".bias"):
            super().load(packed, part, tensor, row=row)
        else:
            self._views.append((self._parts[part].offset + row, tensor))

    def finish(self, packed: DenseWeights) -> DenseWeights:
        for start, view in self._views:
            packed.weight[start : start + len(view)] = view
        return packed


@fault("linear-load-ignores-row", "linear", killed_by="linear.dense.007")
class LoadIgnoresRow(PlainLinear):
    """Every chunk of a matrix is put at its beginning."""

    def load(self, packed: DenseWeights, part: str, tensor: Tensor, *, row: int = 0) -> None:
        super().load(packed, part, tensor)


@fault("linear-parts-overlap", "linear", killed_by="linear.dense.004")
class PartsOverlap(PlainLinear):
    """Every part is put at the first one's place."""

    def load(self, packed: DenseWeights, part: str, tensor: Tensor, *, row: int = 0) -> None:
        super().load(packed, self.spec.parts[0].name if "." not in part else part, tensor, row=row)


@fault("linear-bias-skipped-in-decode", "linear", killed_by="linear.dense.004")
class BiasSkippedInDecode(PlainLinear):
    """The path for one token forgets the bias."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        if len(x) == 1:
            packed = DenseWeights(packed.weight, None)
        return super().apply(x, packed, out=out)


@fault("linear-update-not-seen", "linear", killed_by="linear.update.001")
class UpdateNotSeen(PlainLinear):
    """Products go on with the weights of before."""

    def update(self, packed: DenseWeights, part: str, tensor: Tensor, *, row: int = 0) -> None:
        self.load(DenseWeights(packed.weight.clone(), packed.bias), part, tensor, row=row)


@fault("linear-out-ignored", "linear", killed_by="linear.dense.007")
class OutIgnored(PlainLinear):
    """The caller's storage stays as it was."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        return super().apply(x, packed)


@fault("linear-sums-in-bf16", "linear", killed_by="linear.dense.011")
class SumsInBf16(PlainLinear):
    """Partial sums over columns are rounded to the dtype."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        total = x.new_zeros(len(x), self.spec.out_features)
        for column in range(0, x.shape[1], 8):
            total = total + x[:, column : column + 8] @ packed.weight[:, column : column + 8].T
        total = total if packed.bias is None else total + packed.bias
        return total if out is None else out.copy_(total)


@fault("linear-varies-with-the-batch", "linear", killed_by="linear.batch_invariant.001")
class VariesWithTheBatch(PlainLinear):
    """Sums are split by the number of tokens, while batch invariance is declared."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        half = x.shape[1] // 2 if len(x) > 8 else 0
        total = x[:, half:] @ packed.weight[:, half:].T
        if half:
            total = total + x[:, :half] @ packed.weight[:, :half].T
        total = total if packed.bias is None else total + packed.bias
        return total if out is None else out.copy_(total)


# -- quantized products ---------------------------------------------------------------------------------------


class FaultyQuantized(ReferenceQuantizedLinear):
    """Quantized specs with `product` replaced; dense ones are honest."""

    def apply(self, x: Tensor, packed: QuantizedWeights, *, out: Tensor | None = None) -> Tensor:
        result = self.product(x, packed.matrix)
        result = result if packed.bias is None else result + packed.bias
        return result if out is None else out.copy_(result)

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        return matrix.product(x, None)


def quantized_or_plain(faulty: type[FaultyQuantized]) -> Any:
    """A factory with the fault's docstring."""

    def make(spec: LinearSpec, platform: Platform) -> LinearKernel:
        return PlainLinear(spec, platform) if spec.scheme is None else faulty(spec, platform)

    make.__doc__ = faulty.__doc__
    return make


class RowAndColumnScalesSwapped(FaultyQuantized):
    """An fp8 product is scaled by the weights' scales along its rows, and by the tokens' along its columns."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        scales = matrix.scales.flatten()
        if matrix.scheme.name != "fp8" or matrix.scheme.scales != "channel" or len(x) < 2:
            return super().product(x, matrix)
        honest = super().product(x, matrix).float()
        return (honest / scales * scales[torch.arange(len(x)) % len(scales)].unsqueeze(-1)).to(x.dtype)


class ZeroPointsIgnored(FaultyQuantized):
    """The zero of int4 is always eight."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        if matrix.zeros is None:
            return super().product(x, matrix)
        zeros, matrix.zeros = matrix.zeros, None
        result = super().product(x, matrix)
        matrix.zeros = zeros
        return result


class NextGroupsScale(FaultyQuantized):
    """Each group of columns is scaled by the next one's scale."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        scales = matrix.scales
        matrix.scales = scales.roll(-1, dims=1)
        result = super().product(x, matrix)
        matrix.scales = scales
        return result


class NibblesSwapped(FaultyQuantized):
    """The even column is taken from the high half of an int4 byte."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        if matrix.scheme.name != "int4":
            return super().product(x, matrix)
        values = matrix.values
        matrix.values = (values >> 4) | (values << 4)
        result = super().product(x, matrix)
        matrix.values = values
        return result


class OneScaleForAllTokens(FaultyQuantized):
    """Activations that have a scale for each token are rounded with the largest of them, and coarser still."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        if matrix.scheme.activations != "token":
            return super().product(x, matrix)
        scale = x.float().abs().max() / 7.0
        coarse = (x.float() / scale).round() * scale
        return (coarse @ matrix.dequantize().T).to(x.dtype)


class StaticScaleIgnored(FaultyQuantized):
    """The checkpoint's scale of activations is taken for one."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        if matrix.scheme.activations != "static" or matrix.input_scale is None:
            return super().product(x, matrix)
        rounded = round_activations(x, matrix.scheme, torch.ones_like(matrix.input_scale) * 0.25)
        return (rounded @ matrix.dequantize().T * matrix.input_scale * 4).to(x.dtype)


for _id, _case, _class in (
    ("linear-fp8-scales-swapped", "linear.quantized.027", RowAndColumnScalesSwapped),
    ("linear-zero-points-ignored", "linear.quantized.017", ZeroPointsIgnored),
    ("linear-next-groups-scale", "linear.quantized.013", NextGroupsScale),
    ("linear-nibbles-swapped", "linear.quantized.013", NibblesSwapped),
    ("linear-one-scale-for-all-tokens", "linear.quantized.035", OneScaleForAllTokens),
    ("linear-static-scale-ignored", "linear.quantized.021", StaticScaleIgnored),
):
    fault(_id, "linear", killed_by=_case)(quantized_or_plain(_class))


# -- mixture of experts ---------------------------------------------------------------------------------------


@fault("moe-not-renormalised", "moe", killed_by="moe.route.001")
class NotRenormalised(InvariantMoE):
    """Weights of the picked experts do not sum to one."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        honest = super().route(router_logits, bias)
        scores = router_logits.float().softmax(dim=-1)
        return Routing(scores.gather(-1, honest.expert_ids) * self.spec.router_scale, honest.expert_ids)


@fault("moe-softmax-after-top-k", "moe", killed_by="moe.route.004")
class SoftmaxAfterTopK(InvariantMoE):
    """The softmax is over the picked experts instead of over all."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        honest = super().route(router_logits, bias)
        picked = router_logits.float().gather(-1, honest.expert_ids)
        return Routing(picked.softmax(dim=-1) * self.spec.router_scale, honest.expert_ids)


@fault("moe-scale-ignored", "moe", killed_by="moe.route.007")
class RouterScaleIgnored(InvariantMoE):
    """The router's scale is left out."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        honest = super().route(router_logits, bias)
        return Routing(honest.weights / self.spec.router_scale, honest.expert_ids)


@fault("moe-groups-ignored", "moe", killed_by="moe.route.010")
class GroupsIgnored(InvariantMoE):
    """Experts are picked from all groups."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        scores = router_logits.float()
        scores = scores.softmax(dim=-1) if self.spec.scoring == "softmax" else scores.sigmoid()
        ids = (scores if bias is None else scores + bias).topk(self.spec.top_k, dim=-1).indices
        weights = scores.gather(-1, ids)
        if self.spec.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(weights * self.spec.router_scale, ids)


@fault("moe-correction-weighs", "moe", killed_by="moe.route.016")
class CorrectionWeighs(InvariantMoE):
    """The correction for picking enters the weights."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        honest = super().route(router_logits, bias)
        if bias is None:
            return honest
        weights = honest.weights + bias[honest.expert_ids]
        return Routing(weights / weights.sum(dim=-1, keepdim=True), honest.expert_ids)


@fault("moe-map-wraps", "moe", killed_by="moe.expert_map.001")
class MapWraps(InvariantMoE):
    """-1 in the expert map is the last expert held here."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        wrapped = None if expert_map is None else expert_map.where(expert_map >= 0, len(packed.gate_up) - 1)
        return super().experts(x, routing, packed, expert_map=wrapped)


@fault("moe-map-ignored", "moe", killed_by="moe.expert_map.001")
class MapIgnored(InvariantMoE):
    """Expert ids are taken for places, whatever the map says."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        ids = routing.expert_ids % len(packed.gate_up)
        return super().experts(x, Routing(routing.weights, ids), packed)


@fault("moe-empty-expert-garbage", "moe", killed_by="moe.experts.010")
class EmptyExpertGarbage(InvariantMoE):
    """An expert without tokens leaves what its workspace held."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        result = super().experts(x, routing, packed, expert_map=expert_map)
        empty = len(packed.gate_up) - len(set(routing.expert_ids.flatten().tolist()))
        if empty > len(packed.gate_up) // 2 and len(result):
            result[0] += 1.0
        return result


@fault("moe-gate-and-up-swapped", "moe", killed_by="moe.experts.001")
class GateAndUpSwapped(InvariantMoE):
    """The halves of the first product are loaded in the other order."""

    def load(self, packed: ExpertWeights, expert: int, part: str, tensor: Tensor, *, row: int = 0) -> None:
        name, dot, kind = part.partition(".")
        swapped = {"gate": "up", "up": "gate"}.get(name, name)
        super().load(packed, expert, swapped + dot + kind, tensor, row=row)


@fault("moe-weight-twice", "moe", killed_by="moe.experts.001")
class WeightTwice(InvariantMoE):
    """The router's weight multiplies each share twice."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        return super().experts(x, Routing(routing.weights.square(), routing.expert_ids), packed, expert_map=expert_map)


@fault("moe-weight-on-input", "moe", killed_by="moe.experts.001")
class WeightOnInput(InvariantMoE):
    """The router's weight multiplies what goes into an expert instead of what comes out."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        total = torch.zeros_like(x)
        for choice in range(routing.expert_ids.shape[1]):
            weight, ids = routing.weights[:, choice : choice + 1], routing.expert_ids[:, choice : choice + 1]
            one = Routing(torch.ones_like(weight), ids)
            total = total + super().experts((x * weight).to(x.dtype), one, packed, expert_map=expert_map)
        return total


@fault("moe-shared-dropped", "moe", killed_by="moe.experts.019")
class SharedDropped(InvariantMoE):
    """The shared experts' output is not added."""

    def apply(
        self, x: Tensor, router_logits: Tensor, packed: Any, *, shared: Tensor | None = None, **rest: Any
    ) -> Tensor:
        return super().apply(x, router_logits, packed, **rest)


@fault("moe-last-token-dropped", "moe", killed_by="moe.experts.007")
class LastTokenDropped(InvariantMoE):
    """Of an odd number of tokens beyond a tile, the last is left out."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        result = super().experts(x, routing, packed, expert_map=expert_map)
        if len(x) > 16 and len(x) % 2:
            result[-1] = 0
        return result


@fault("moe-first-experts-scales", "moe", killed_by="moe.quantized.001")
class FirstExpertsScales(InvariantMoE):
    """Every expert's integers are scaled by the first one's scales."""

    def load(self, packed: ExpertWeights, expert: int, part: str, tensor: Tensor, *, row: int = 0) -> None:
        if part.endswith(".scale"):
            first: dict[str, Tensor] = self.__dict__.setdefault("_first", {})
            tensor = first.setdefault(part, tensor.clone())
        super().load(packed, expert, part, tensor, row=row)


@fault("moe-varies-with-the-batch", "moe", killed_by="moe.batch_invariant.001")
class MoeVariesWithTheBatch(InvariantMoE):
    """Larger batches sum in another order, while batch invariance is declared."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        result = super().experts(x, routing, packed, expert_map=expert_map)
        return result * (1 + 2.0**-20) if len(x) > 8 else result
