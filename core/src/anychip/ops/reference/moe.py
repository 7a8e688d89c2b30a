"""Reference mixture of experts: routing as the papers write it, experts one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.ops.reference.functional import gated_activation
from anychip.ops.reference.quantized import QuantizedMatrix
from anychip.plugin_api import FusedMoE, Routing


@dataclass(slots=True)
class ExpertWeights:
    """By expert: gate stacked on up [2 * intermediate_size, hidden_size], or up alone, and down [hidden_size,
    intermediate_size].
    Dense ones are views of one tensor each."""

    gate_up: Sequence[Tensor | QuantizedMatrix]
    down: Sequence[Tensor | QuantizedMatrix]
    gate_up_bias: Tensor | None  # [num_experts, 2 * intermediate_size]
    down_bias: Tensor | None  # [num_experts, hidden_size]


class ReferenceMoE(FusedMoE):
    name = "reference"

    def begin(self) -> ExpertWeights:
        s = self.spec
        wide, tall = ((2 if s.gated else 1) * s.intermediate_size, s.hidden_size), (s.hidden_size, s.intermediate_size)
        return ExpertWeights(
            gate_up=self._matrices(wide),
            down=self._matrices(tall),
            gate_up_bias=self._empty((s.num_held, wide[0])) if s.bias else None,
            down_bias=self._empty((s.num_held, tall[0])) if s.bias else None,
        )

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return self.platform.empty(shape, self.spec.dtype, "weights")

    def _matrices(self, shape: tuple[int, int]) -> Sequence[Tensor | QuantizedMatrix]:
        scheme = self.spec.scheme
        if scheme is None:
            return self._empty((self.spec.num_held, *shape)).unbind()
        return [QuantizedMatrix.allocate(shape, scheme, self.platform) for _ in range(self.spec.num_held)]

    def load(self, packed: ExpertWeights, expert: int, part: str, tensor: Tensor, *, row: int = 0) -> None:
        name, _, kind = part.partition(".")
        s = self.spec
        offset = s.intermediate_size if name == "up" and s.gated else 0
        rows = s.hidden_size if name == "down" else s.intermediate_size
        if kind == "bias":
            bias = packed.down_bias if name == "down" else packed.gate_up_bias
            assert bias is not None, f"{part}: the spec has no bias"
            bias[expert, offset : offset + rows].copy_(tensor)
            return
        matrix = (packed.down if name == "down" else packed.gate_up)[expert]
        if isinstance(matrix, QuantizedMatrix):
            matrix.load(kind, tensor, offset, rows, row)
        else:
            matrix[offset + row : offset + row + tensor.shape[0]].copy_(tensor)

    def expert_tensors(self, packed: ExpertWeights, expert: int) -> list[Tensor]:
        found: list[Tensor] = []
        for matrix in (packed.gate_up[expert], packed.down[expert]):
            found += matrix.tensors if isinstance(matrix, QuantizedMatrix) else [matrix]
        return found + [bias[expert] for bias in (packed.gate_up_bias, packed.down_bias) if bias is not None]

    def remap(self, packed: ExpertWeights, expert_map: Tensor) -> ExpertWeights:
        held = (expert_map >= 0).nonzero().squeeze(-1)
        local = held[expert_map[held].argsort()].tolist()
        return ExpertWeights(
            [packed.gate_up[i] for i in local],
            [packed.down[i] for i in local],
            None if packed.gate_up_bias is None else packed.gate_up_bias[local],
            None if packed.down_bias is None else packed.down_bias[local],
        )

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        s = self.spec
        logits = router_logits.float()
        scores = logits.softmax(dim=-1) if s.scoring == "softmax" else logits.sigmoid()
        picking = scores if bias is None else scores + bias
        if s.num_groups > 1:
            grouped = picking.view(*picking.shape[:-1], s.num_groups, -1)
            best = grouped.amax(dim=-1) if bias is None else grouped.topk(2, dim=-1).values.sum(dim=-1)
            kept = torch.zeros_like(best).scatter(-1, best.topk(s.top_groups, dim=-1).indices, 1.0)
            picking = grouped.masked_fill(kept.unsqueeze(-1) == 0, -torch.inf).flatten(-2)
        expert_ids = picking.topk(s.top_k, dim=-1).indices
        weights = scores.gather(-1, expert_ids)
        if s.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(weights * s.router_scale, expert_ids)

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        ids = routing.expert_ids if expert_map is None else expert_map[routing.expert_ids]
        result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in range(len(packed.gate_up)):
            token, choice = (ids == expert).nonzero(as_tuple=True)
            if token.numel():
                share = self.expert(x[token], packed, expert).float() * routing.weights[token, choice, None]
                result.index_add_(0, token, share)
        return result.to(x.dtype)

    @property
    def has_products(self) -> bool:
        """Of weights that lie as the reference's do."""
        return type(self).begin is ReferenceMoE.begin

    def product(self, x: Tensor, expert_ids: Tensor, packed: ExpertWeights, part: Literal["gate_up", "down"]) -> Tensor:
        """Every expert on every row, so that no shape depends on the routing."""
        matrices, biases = getattr(packed, part), getattr(packed, f"{part}_bias")
        result: Tensor | None = None
        for expert, matrix in enumerate(matrices):
            of_expert = _product(x, matrix, None if biases is None else biases[expert])
            result = of_expert if result is None else torch.where((expert_ids == expert)[:, None], of_expert, result)
        assert result is not None, "a rank holds an expert at least"
        return result

    def expert(self, x: Tensor, packed: ExpertWeights, expert: int) -> Tensor:
        """One expert on tokens [num_tokens, hidden_size]."""
        up_bias, down_bias = packed.gate_up_bias, packed.down_bias
        hidden = _product(x, packed.gate_up[expert], None if up_bias is None else up_bias[expert])
        hidden = gated_activation(gate_up=hidden, activation=self.spec.activation)
        return _product(hidden, packed.down[expert], None if down_bias is None else down_bias[expert])


def _product(x: Tensor, matrix: Tensor | QuantizedMatrix, bias: Tensor | None) -> Tensor:
    return matrix.product(x, bias) if isinstance(matrix, QuantizedMatrix) else F.linear(x, matrix, bias)
