"""Experts as XLA compiles them: all of them on every token, weighted by zero where they were not picked, so that no
shape depends on the routing. Of several devices each holds some experts, and the compiler sums their shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import ExpertWeights, ReferenceMoE, WidenedMoE, can_widen, with_wide_scales
from anychip.ops.reference.functional import gated_activation
from anychip.ops.reference.quantized import QuantizedMatrix, round_activations
from anychip.plugin_api import FusedMoE, MoESpec, Placed, Platform, Routing, Sharded, Unsupported
from anychip_tpu.linear import WIDENED
from anychip_tpu.runtimes import Runtime

BY_EXPERT: Placed = (Sharded(dim=0),)


@dataclass(slots=True)
class StackedExperts:
    """Values [num_experts, rows, columns] in the spec's dtype, or a quantized matrix whose tensors are stacked so."""

    gate_up: Tensor | QuantizedMatrix
    down: Tensor | QuantizedMatrix
    gate_up_bias: Tensor | None  # [num_experts, 2 * intermediate_size]
    down_bias: Tensor | None  # [num_experts, hidden_size]


class XlaMoE(ReferenceMoE):
    name = "xla"

    def __init__(self, spec: MoESpec, platform: Platform, runtime: Runtime) -> None:
        super().__init__(spec, platform)
        self._runtime = runtime

    def finish(self, packed: ExpertWeights) -> StackedExperts:
        upload = self._runtime.upload
        return StackedExperts(
            self._stacked(packed.gate_up),
            self._stacked(packed.down),
            None if packed.gate_up_bias is None else upload(packed.gate_up_bias, BY_EXPERT),
            None if packed.down_bias is None else upload(packed.down_bias, BY_EXPERT),
        )

    def _stacked(self, matrices: Sequence[Tensor | QuantizedMatrix]) -> Tensor | QuantizedMatrix:
        first, upload = matrices[0], self._runtime.upload
        if isinstance(first, Tensor):
            whole = first._base if first._base is not None else torch.stack([*matrices])  # type: ignore[misc]
            return upload(whole, BY_EXPERT)
        return _mapped(first, lambda name: upload(torch.stack([getattr(each, name) for each in matrices]), BY_EXPERT))

    def update(self, packed: Any, expert: int, part: str, tensor: Tensor, *, row: int = 0) -> None:
        raise Unsupported("anychip-tpu", ["weights are not rewritten: Capabilities.reload is none"])

    def expert_tensors(self, packed: Any, expert: int) -> Sequence[Tensor]:  # type: ignore[override]
        raise Unsupported("anychip-tpu", ["experts that move: programs are compiled for where they lie"])

    def remap(self, packed: Any, expert_map: Tensor) -> Any:
        """expert_map as FusedMoE has it, on the host."""
        map_ = expert_map.cpu()
        held = (map_ >= 0).nonzero().squeeze(-1)
        local = held[map_[held].argsort()].to(self._runtime.torch_device)

        def picked(value: Any) -> Any:
            if isinstance(value, QuantizedMatrix):
                return _mapped(value, lambda name: getattr(value, name).index_select(0, local))
            return None if value is None else value.index_select(0, local)

        return StackedExperts(**{field.name: picked(getattr(packed, field.name)) for field in fields(packed)})

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        if not len(router_logits):  # XLA takes no slice out of nothing
            empty = router_logits.new_zeros(0, self.spec.top_k)
            return Routing(empty.float(), empty.long())
        return super().route(router_logits, bias)

    def experts(
        self, x: Tensor, routing: Routing, packed: StackedExperts, *, expert_map: Tensor | None = None
    ) -> Tensor:
        hidden = self._product(x.unsqueeze(0), packed.gate_up, packed.gate_up_bias)  # [experts, tokens, 2 * inter]
        hidden = gated_activation(gate_up=hidden, activation=self.spec.activation)
        outputs = self._product(hidden, packed.down, packed.down_bias).float()  # [experts, tokens, hidden_size]
        ids = routing.expert_ids if expert_map is None else expert_map[routing.expert_ids]
        experts = torch.arange(outputs.shape[0], device=x.device)
        picked = ids.unsqueeze(-1) == experts  # [tokens, top_k, experts]
        share = torch.where(picked, routing.weights.unsqueeze(-1), 0.0).sum(dim=1)  # [tokens, experts]
        # A share of zero must hide an output that is not finite.
        counted = torch.where(picked.any(dim=1).T.unsqueeze(-1), outputs, 0.0)
        return (counted * share.T.unsqueeze(-1)).sum(dim=0).to(x.dtype)

    def _product(self, x: Tensor, matrix: Tensor | QuantizedMatrix, bias: Tensor | None) -> Tensor:
        """x [1 or num_experts, num_tokens, columns] by each expert's matrix."""
        if isinstance(matrix, Tensor):
            result = torch.matmul(x, matrix.transpose(1, 2))
        else:
            tokens = x.shape[1]
            flat = x.flatten(0, 1)
            rounded = round_activations(flat, matrix.scheme, None).unflatten(0, (x.shape[0], tokens))
            result = torch.matmul(rounded, _dequantized(matrix).transpose(1, 2))
        if bias is not None:
            result = result + bias.to(result.dtype).unsqueeze(1)
        return result.to(x.dtype)


def make_moe(spec: MoESpec, platform: Platform, runtime: Runtime) -> FusedMoE:
    """Raises Unsupported for activations of one scale an expert, which all experts' one product cannot have."""
    spec = with_wide_scales(spec)
    scheme = spec.scheme
    if scheme is not None and scheme.activations == "static":
        raise Unsupported("anychip-tpu", [f"experts in {scheme.name} with static scales of activations"])
    if scheme is not None and scheme.name in WIDENED and can_widen(scheme):
        return WidenedMoE(spec, platform, lambda plain: XlaMoE(plain, platform, runtime))
    return XlaMoE(spec, platform, runtime)


def _mapped(matrix: QuantizedMatrix, change: Callable[[str], Tensor]) -> QuantizedMatrix:
    """With `change` of its name in place of each tensor; a codebook is the same for all experts."""
    tensors = [field.name for field in fields(matrix) if isinstance(getattr(matrix, field.name), Tensor)]
    return replace(matrix, **{name: change(name) for name in tensors if name != "codebook"})


def _dequantized(matrix: QuantizedMatrix) -> Tensor:
    """[num_experts, rows, columns] float32 of stacked matrices."""
    experts, rows = matrix.values.shape[:2]
    flat = _mapped(matrix, lambda name: getattr(matrix, name).flatten(0, 1))
    return replace(flat, shape=(experts * rows, matrix.shape[1])).dequantize().unflatten(0, (experts, rows))
