"""Mixture of experts on Triton kernels: routed, sorted by expert, two grouped products, combined."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.ops.reference import ReferenceMoE
from anychip.ops.reference.quantized import QuantizedMatrix
from anychip.plugin_api import MoESpec, Platform, QuantScheme, Routing
from anychip_triton.kernels.experts import combine_pairs, expert_matmul
from anychip_triton.kernels.routing import route, sort_pairs
from anychip_triton.launch import Launcher, split_tile
from anychip_triton.linear import (
    WIDENED_ROWS,
    as_bytes,
    product_arguments,
    quantized_activations,
    storable,
    weights_problem,
    why_not,
    widened,
)
from anychip_triton.shapes import power_of_two, rows_of

_UNSORTED_PAIRS = 64
"""Pairs up to which each is a tile of its own: sorting costs more launches than experts that meet twice cost reads."""

WIDENED_PAIRS = 2048
"""Pairs above which weights of few bits are widened first: all experts at once, in memory of the step's own."""


@dataclass(slots=True)
class StackedExperts:
    """All experts below one another; what ReferenceMoE.load writes to are views of it."""

    gate_up: Tensor | QuantizedMatrix  # [num_experts, 2 * intermediate_size, hidden_size], or so many rows
    down: Tensor | QuantizedMatrix
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    num_experts: int


def unserved(spec: MoESpec) -> str:
    """Why the kernels do not serve a spec; "" where they do."""
    if spec.scheme is None:
        return ""
    if spec.scheme.activations == "static":
        return "experts with a static input scale each"
    return why_not(spec.scheme)


class TritonMoE(ReferenceMoE):
    name = "triton"

    def __init__(self, spec: MoESpec, platform: Platform, launch: Launcher) -> None:
        super().__init__(spec, platform)
        self._launch = launch

    def begin(self) -> StackedExperts:  # type: ignore[override]
        s = self.spec
        wide, tall = (2 * s.intermediate_size, s.hidden_size), (s.hidden_size, s.intermediate_size)
        return StackedExperts(
            gate_up=self._stacked(wide),
            down=self._stacked(tall),
            gate_up_bias=self._empty((s.num_held, wide[0])) if s.bias else None,
            down_bias=self._empty((s.num_held, tall[0])) if s.bias else None,
            num_experts=s.num_held,
        )

    def _stacked(self, shape: tuple[int, int]) -> Tensor | QuantizedMatrix:
        spec = self.spec
        if spec.scheme is None:
            return self._empty((spec.num_held, *shape))
        return QuantizedMatrix.allocate((spec.num_held * shape[0], shape[1]), spec.scheme, self.platform)

    def load(self, packed: StackedExperts, expert: int, part: str, tensor: Tensor, *, row: int = 0) -> None:  # type: ignore[override]
        name, _, kind = part.partition(".")
        s = self.spec
        offset = s.intermediate_size if name == "up" else 0
        rows = s.hidden_size if name == "down" else s.intermediate_size
        if kind == "bias":
            bias = packed.down_bias if name == "down" else packed.gate_up_bias
            assert bias is not None, f"{part}: the spec has no bias"
            bias[expert, offset : offset + rows].copy_(tensor)
            return
        weights = packed.down if name == "down" else packed.gate_up
        if isinstance(weights, QuantizedMatrix):
            height = rows if name == "down" else 2 * rows
            weights.load(kind, storable(tensor, kind, self._launch.target), expert * height + offset, rows, row)
        else:
            weights[expert, offset + row : offset + row + tensor.shape[0]].copy_(tensor)

    def expert_tensors(self, packed: StackedExperts, expert: int) -> list[Tensor]:  # type: ignore[override]
        found: list[Tensor] = []
        for weights in (packed.gate_up, packed.down):
            if isinstance(weights, QuantizedMatrix):
                height = weights.shape[0] // packed.num_experts
                found += [part[expert * height :][:height] for part in weights.tensors]
            else:
                found.append(weights[expert])
        return found + [bias[expert] for bias in (packed.gate_up_bias, packed.down_bias) if bias is not None]

    def remap(self, packed: StackedExperts, expert_map: Tensor) -> StackedExperts:  # type: ignore[override]
        held = (expert_map >= 0).nonzero().squeeze(-1)
        local = held[expert_map[held].argsort()]
        biases = (packed.gate_up_bias, packed.down_bias)
        return StackedExperts(
            _picked(packed.gate_up, local, packed.num_experts),
            _picked(packed.down, local, packed.num_experts),
            *(None if bias is None else bias[local] for bias in biases),
            num_experts=len(local),
        )

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        s = self.spec
        if s.num_groups > 1:
            return super().route(router_logits, bias)
        router_logits = rows_of(router_logits)
        tokens = router_logits.shape[0]
        weights = torch.empty((tokens, s.top_k), dtype=torch.float32, device=router_logits.device)
        expert_ids = torch.empty((tokens, s.top_k), dtype=torch.int32, device=router_logits.device)
        tile = self._launch.tiles.tile("route", experts=s.num_experts)
        self._launch(
            route, (tokens,), split_tile(tile)[1],
            weights=weights, expert_ids=expert_ids, logits=router_logits,
            bias=router_logits if bias is None else bias, router_scale=float(s.router_scale),
            stride=router_logits.stride(0), experts=s.num_experts, TOP_K=s.top_k, PADDED_K=power_of_two(s.top_k),
            BLOCK=power_of_two(s.num_experts), SCORING=s.scoring, HAS_BIAS=bias is not None, RENORMALIZE=s.renormalize,
        )  # fmt: skip
        return Routing(weights, expert_ids)

    def experts(  # type: ignore[override]
        self, x: Tensor, routing: Routing, packed: StackedExperts, *, expert_map: Tensor | None = None
    ) -> Tensor:
        s, x = self.spec, rows_of(x)
        ids = routing.expert_ids if expert_map is None else expert_map[routing.expert_ids.long()]
        pair_experts = ids.flatten().to(torch.int32)
        gate_up, down = (self._multiplied(weights, pair_experts.numel()) for weights in (packed.gate_up, packed.down))
        order = self._order(pair_experts, packed.num_experts, None if isinstance(gate_up, Tensor) else gate_up.scheme)
        hidden = self._product(x, gate_up, packed.gate_up_bias, order, top_k=ids.shape[1], activation=s.activation)
        parts = self._product(hidden, down, packed.down_bias, order, top_k=1, activation="")
        result = torch.empty_like(x)
        blocks, options = split_tile(self._launch.tiles.tile("combine_pairs", width=s.hidden_size))
        self._launch(
            combine_pairs, (x.shape[0], -(-s.hidden_size // blocks["BLOCK"])), options,
            out=result, parts=parts, weights=routing.weights, pair_experts=pair_experts, width=s.hidden_size,
            TOP_K=ids.shape[1], **blocks,
        )  # fmt: skip
        return result

    def _multiplied(self, weights: Tensor | QuantizedMatrix, pairs: int) -> Tensor | QuantizedMatrix:
        """Weights as products of so many pairs take them: of few bits, as they are or widened first."""
        if isinstance(weights, Tensor) or pairs <= WIDENED_PAIRS or weights.scheme.name not in WIDENED_ROWS:
            return weights
        return widened(self._launch, weights, getattr(torch, self.spec.dtype))

    def _order(self, pair_experts: Tensor, num_experts: int, scheme: QuantScheme | None) -> PairOrder:
        """Pairs by expert, unless there are so few that each becomes a tile."""
        pairs = pair_experts.numel()
        s = self.spec
        problem = {"pairs": pairs, "features": s.intermediate_size, "columns": s.hidden_size}
        problem |= {"item": getattr(torch, s.dtype).itemsize, **weights_problem(scheme)}
        blocks, options = split_tile(self._launch.tiles.tile("expert_matmul", **problem))
        if pairs <= _UNSORTED_PAIRS:
            return PairOrder(pair_experts, pair_experts, pair_experts, pair_experts, pairs, False, blocks, options)
        arrays = {
            name: torch.empty((count,), dtype=torch.int32, device=pair_experts.device)
            for name, count in (("order", pairs), ("pair_ends", num_experts), ("tile_ends", num_experts))
        }
        size = blocks["BLOCK_M"]
        sorting, warps = split_tile(self._launch.tiles.tile("sort_pairs", **problem))
        self._launch(
            sort_pairs, (num_experts,), warps,
            **arrays, pair_experts=pair_experts, pairs=pairs, experts=num_experts, BINS=power_of_two(num_experts + 1),
            TILE=size, **sorting,
        )  # fmt: skip
        tiles = -(-pairs // size) + num_experts
        return PairOrder(pair_experts, **arrays, num_tiles=tiles, is_sorted=True, blocks=blocks, options=options)

    def _product(
        self,
        x: Tensor,
        weights: Tensor | QuantizedMatrix,
        bias: Tensor | None,
        order: PairOrder,
        *,
        top_k: int,
        activation: str,
    ) -> Tensor:
        """[pairs, out_features] of x [tokens, columns], or of [pairs, columns] with top_k 1."""
        spec, launch = self.spec, self._launch
        matrix = weights if isinstance(weights, QuantizedMatrix) else None
        values = matrix.values if matrix is not None else weights
        assert isinstance(values, Tensor)
        held, x_scale, kind = (x, None, "plain") if matrix is None else quantized_activations(launch, x, matrix)
        pairs = order.pair_experts.numel()
        features = spec.intermediate_size if activation else spec.hidden_size
        result = torch.empty((pairs, features), dtype=x.dtype, device=x.device)
        scheme = None if matrix is None else matrix.scheme
        arguments = product_arguments(launch, scheme, kind, x_scale, order.blocks, result.dtype)
        zeros = None if matrix is None else matrix.zeros
        launch(
            expert_matmul, (-(-features // arguments["BLOCK_N"]), order.num_tiles), order.options,
            out=result, x=held, x_scale=result if x_scale is None else x_scale, w=as_bytes(values),
            w_scale=result if matrix is None else matrix.scales, w_zero=result if zeros is None else zeros,
            bias=result if bias is None else bias, pair_experts=order.pair_experts, order=order.order,
            pair_ends=order.pair_ends, tile_ends=order.tile_ends, num_experts=len(order.pair_ends),
            out_features=features, columns=x.shape[1], x_stride=held.stride(0), w_stride=values.stride(-2),
            w_groups=0 if matrix is None else matrix.scales.shape[1], TOP_K=top_k, SORTED=order.is_sorted,
            ACTIVATION=activation, HAS_BIAS=bias is not None, **arguments,
        )  # fmt: skip
        return result


@dataclass(slots=True)
class PairOrder:
    """(token, choice) pairs as the products take them. Unsorted: one pair a tile, and the arrays of order are not
    read."""

    pair_experts: Tensor  # [pairs] int32, -1 where the expert is not here
    order: Tensor  # [pairs] int32
    pair_ends: Tensor  # [num_experts] int32
    tile_ends: Tensor  # [num_experts] int32
    num_tiles: int
    is_sorted: bool
    blocks: dict[str, int]
    options: dict[str, int]


def _picked(weights: Tensor | QuantizedMatrix, local: Tensor, num_experts: int) -> Tensor | QuantizedMatrix:
    if isinstance(weights, Tensor):
        return weights[local]

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.view(num_experts, -1, tensor.shape[1])[local].flatten(0, 1)

    values, scales = rows(weights.values), rows(weights.scales)
    assert values is not None and scales is not None
    shape = (values.shape[0], weights.shape[1])
    return QuantizedMatrix(weights.scheme, shape, values, scales, rows(weights.zeros), weights.input_scale)
