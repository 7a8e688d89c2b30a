"""Mixtures of experts in transformers' code, on the platform's fused experts.

The library's router picks, its shared experts stay its own, and what it calls its experts interface runs ours. Experts
that fused kernels do not have (an activation of their own, no gate) run in the library's grouped products, with their
weights whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate, grouped_mm_experts_forward

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.expert_slots import check_experts, expert_placement
from anychip.layers.travel import over_lanes
from anychip.models.transformers_weights import Conversions
from anychip.plugin_api import Activation, MoESpec, Routing, Span
from anychip.weights.matrix import Matrix, MatrixStack, Put, StackPiece

EXPERTS_FUNCTION = "anychip"
"""Its name in transformers' registry."""

_ACTIVATIONS: dict[type, Activation] = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
}

Run = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""The library's module, hidden states [num_tokens, hidden_size], picked experts and their weights [num_tokens, top_k]
-> [num_tokens, hidden_size]."""


def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the library calls: whatever the model was given for it."""
    run: Run = module.anychip_experts()
    return run(module, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, experts)


def is_experts(module: nn.Module) -> bool:
    """Whether the library's decorator for experts made the module."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "is_concatenated", "_apply_gate"))


def give_experts(model: nn.Module, run: Run) -> None:
    for module in model.modules():
        if is_experts(module):
            module.anychip_experts = lambda: run  # type: ignore[assignment]


def run_plain(model: nn.Module) -> None:
    """Experts that are not ours run over their stacked weights."""
    give_experts(model, grouped_mm_experts_forward)


def record_experts(model: nn.Module, names: dict[int, str]) -> dict[str, int]:
    """Lets experts answer zeros; by module, as they are called, how many of them are picked for a token."""
    picked: dict[str, int] = {}

    def record(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        picked[names[id(module)]] = index.shape[-1]
        return hidden.new_zeros(hidden.shape)

    give_experts(model, record)
    return picked


def fused_experts(
    builder: Builder, name: str, module: Any, top_k: int, conversions: Conversions
) -> FusedExperts | None:
    """Our experts for the library's module `name`; None where the kernels have none such."""
    activation = _ACTIVATIONS.get(type(getattr(module, "act_fn", None)))
    plain = module.has_gate and not module.has_bias and not module.has_post_expert_norm
    own_gate = type(module)._apply_gate is not _default_apply_gate
    if activation is None or not plain or own_gate or not hasattr(module, "gate_up_proj"):
        return None
    count, outputs, hidden_size = module.gate_up_proj.shape
    if module.is_transposed:
        outputs, hidden_size = hidden_size, outputs
    shape, placed = builder.mesh.shape, expert_placement(builder.mesh.shape)
    reasons = []
    if shape.size_of("ep") > 1 and not shape.covers("ep", "tp"):
        reasons.append("an axis ep beside tp")
    if builder.moves_experts:
        reasons.append("experts that move between ranks (--eplb-interval)")
    if over_lanes(shape):
        reasons.append(
            "experts over the ranks of several lanes (--data-parallel-size with --expert-parallel); leave one out"
        )
    if reasons:
        raise Unsupported(f"{type(module).__name__} through transformers", reasons)
    check_experts(count, shape, f"experts of {name}")
    here, span, _ = builder.held((count, outputs // 2, hidden_size), placed, f"expert features of {name}")
    spec = MoESpec(
        num_experts=count,
        top_k=top_k,
        hidden_size=hidden_size,
        intermediate_size=span.count,
        dtype=builder.dtype,
        activation=activation,
        placed=placed,
        num_local_experts=here.count if here.count < count else None,
    )
    return FusedExperts(builder, name, spec, here, span, outputs // 2, module, conversions)


class FusedExperts(nn.Module):
    """Stands for one of the library's modules of experts. A rank holds the experts `here`, or of each expert the
    features `span`, and adds what it has to the sum along tp."""

    def __init__(
        self,
        builder: Builder,
        name: str,
        spec: MoESpec,
        here: Span,
        span: Span,
        intermediate_size: int,
        module: Any,
        conversions: Conversions,
    ) -> None:
        super().__init__()
        self.communicator = builder.mesh.axis("tp")
        self.here = here
        builder.expert_layers.append(self)
        apart = conversions.experts(name, spec.num_experts)
        modules = [part for each in apart for part in (each.gate, each.up, each.down)]
        scheme = builder.scheme(
            modules or [f"{name}.gate_up_proj", f"{name}.down_proj"], gcd(spec.hidden_size, intermediate_size)
        )
        self.spec = replace(spec, scheme=scheme)
        self.kernel = builder.platform.moe(self.spec)
        self.packed = self.kernel.begin()
        self.expert_map: Tensor | None = None
        if here.count < spec.num_experts:
            places = torch.full((spec.num_experts,), -1)
            places[slice(*here.bounds)] = torch.arange(here.count)
            self.expert_map = builder.platform.empty(tuple(places.shape), "int64", "weights").copy_(places)
        builder.weights.finishers.append(self._finish)
        matrices = self._matrices(span, intermediate_size)
        if apart:
            for expert, each in enumerate(apart):
                sources = (("gate", each.gate), ("up", each.up), ("down", each.down))
                if expert not in range(*here.bounds):
                    builder.weights.elsewhere += tuple(f"{source}." for _, source in sources)
                    continue
                for part, source in sources:
                    builder.formats.want(builder.weights, matrices(part, source, expert))
        else:
            self._want_stacks(builder, name, module, span, intermediate_size, matrices)

    def _matrices(self, span: Span, intermediate_size: int) -> Callable[[str, str, int], Matrix]:
        hidden = Span(0, self.spec.hidden_size)
        wide, tall = (intermediate_size, hidden.count), (hidden.count, intermediate_size)

        def matrix(part: str, name: str, expert: int) -> Matrix:
            shape, rows, columns = (tall, hidden, span) if part == "down" else (wide, span, hidden)
            put = self._put(part, expert)
            return Matrix(name=name, shape=shape, rows=rows, columns=columns, scheme=self.spec.scheme, put=put)

        return matrix

    def _put(self, part: str, expert: int) -> Put:
        def put(kind: str, tensor: Tensor, row: int = 0) -> None:
            self.kernel.load(self.packed, expert - self.here.start, f"{part}.{kind}" if kind else part, tensor, row=row)

        return put

    def _want_stacks(
        self,
        builder: Builder,
        name: str,
        module: Any,
        span: Span,
        intermediate_size: int,
        matrices: Callable[[str, str, int], Matrix],
    ) -> None:
        """gate_up_proj holds gate and up of every expert, below one another or in turns."""
        count, hidden_size = self.spec.num_experts, self.spec.hidden_size
        start, stop = span.bounds

        def piece(part: str, rows: slice) -> StackPiece:
            return StackPiece(
                rows, [matrices(part, f"{name}.{expert}.{part}", expert) for expert in range(*self.here.bounds)]
            )

        if module.is_concatenated:
            halves = slice(start, stop), slice(intermediate_size + start, intermediate_size + stop)
        else:
            halves = slice(2 * start, 2 * stop, 2), slice(2 * start + 1, 2 * stop, 2)
        for stacked, shape, pieces in (
            ("gate_up_proj", (2 * intermediate_size, hidden_size), (piece("gate", halves[0]), piece("up", halves[1]))),
            ("down_proj", (hidden_size, intermediate_size), (piece("down", slice(0, hidden_size)),)),
        ):
            stack = MatrixStack(
                name=f"{name}.{stacked}",
                count=count,
                held=self.here,
                shape=shape,
                pieces=pieces,
                outputs_first=not module.is_transposed,
            )
            builder.formats.want_stack(builder.weights, stack)

    def _finish(self) -> None:
        self.packed = self.kernel.finish(self.packed)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routing = Routing(top_k_weights.float(), top_k_index)
        return self.communicator.all_reduce(
            self.kernel.experts(hidden_states, routing, self.packed, expert_map=self.expert_map)
        )
