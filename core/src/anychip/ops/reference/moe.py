"""Reference mixture of experts: routing as the papers write it, experts one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.ops.reference.functional import gated_activation
from anychip.plugin_api import FusedMoE, MoESpec, Platform, Routing, Unsupported


@dataclass(slots=True)
class ExpertWeights:
    gate_up: Tensor  # [num_experts, 2 * intermediate_size, hidden_size]
    down: Tensor  # [num_experts, hidden_size, intermediate_size]


class ReferenceMoE(FusedMoE):
    name = "reference"

    def __init__(self, spec: MoESpec, platform: Platform) -> None:
        if spec.scheme is not None:
            raise Unsupported("reference MoE", [f"quantization scheme {spec.scheme!r} has no reference yet"])
        super().__init__(spec, platform)

    def begin(self) -> ExpertWeights:
        s = self.spec
        return ExpertWeights(
            gate_up=self.platform.empty((s.num_experts, 2 * s.intermediate_size, s.hidden_size), s.dtype, "weights"),
            down=self.platform.empty((s.num_experts, s.hidden_size, s.intermediate_size), s.dtype, "weights"),
        )

    def load(self, packed: ExpertWeights, expert: int, part: str, tensor: Tensor) -> None:
        half = self.spec.intermediate_size
        target = {
            "gate": packed.gate_up[expert, :half],
            "up": packed.gate_up[expert, half:],
            "down": packed.down[expert],
        }[part]
        target.copy_(tensor)

    def remap(self, packed: ExpertWeights, expert_map: Tensor) -> ExpertWeights:
        held = (expert_map >= 0).nonzero().squeeze(-1)
        local = held[expert_map[held].argsort()]
        return ExpertWeights(packed.gate_up[local], packed.down[local])

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
        for expert in range(packed.gate_up.shape[0]):
            token, choice = (ids == expert).nonzero(as_tuple=True)
            if token.numel():
                hidden = F.linear(x[token], packed.gate_up[expert])
                hidden = gated_activation(gate_up=hidden, activation=self.spec.activation)
                share = F.linear(hidden, packed.down[expert]).float() * routing.weights[token, choice, None]
                result.index_add_(0, token, share)
        return result.to(x.dtype)
