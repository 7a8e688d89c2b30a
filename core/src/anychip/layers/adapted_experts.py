"""Experts with adapters: their products one by one, with what adapters add between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anychip.layers.build import Builder
from anychip.plugin_api import AdaptedPart, AdapterSite, FusedMoE, Routing, Span, StepAdapters


class AdaptedExperts:
    """Beside a mixture's kernel, for steps with adapters. `modules` are gate, up and down of every expert that this
    rank holds, `span` is its share of their `intermediate_size` features."""

    def __init__(
        self,
        builder: Builder,
        kernel: FusedMoE,
        modules: Sequence[tuple[str, str, str]],
        intermediate_size: int,
        span: Span,
    ) -> None:
        spec = kernel.spec
        self.kernel = kernel
        self.ops = builder.ops
        self.num_experts = len(modules)
        hidden, everything = spec.hidden_size, Span(0, spec.hidden_size)
        gates = [
            AdaptedPart(module=module, rows=intermediate_size, held=span, offset=at * span.count)
            for at, module in enumerate(modules[0][:2])
        ]
        self.gate_up = builder.add_site(
            in_features=hidden,
            columns=everything,
            out_features=2 * span.count,
            parts=tuple(gates),
            dtype=spec.dtype,
            experts=tuple(names[:2] for names in modules),
        )
        self.down = builder.add_site(
            in_features=intermediate_size,
            columns=span,
            out_features=hidden,
            parts=(AdaptedPart(module=modules[0][2], rows=hidden, held=everything, offset=0),),
            dtype=spec.dtype,
            experts=tuple(names[2:] for names in modules),
        )

    def __call__(self, x: Tensor, routing: Routing, packed: Any, adapters: StepAdapters) -> Tensor:
        """FusedMoE.experts of x [num_tokens, hidden_size], with the adapters of the step's tokens. Every expert is
        held here."""
        choices = routing.expert_ids.shape[1]
        ids = routing.expert_ids.flatten()
        slots = adapters.slots.repeat_interleave(choices).to(ids.dtype)
        # An expert's place within its token's slot.
        places = torch.where(slots < 0, -1, slots * self.num_experts + ids).to(torch.int32)
        rows = x.repeat_interleave(choices, dim=0)
        gate_up = self._product(rows, ids, packed, self.gate_up, places, adapters)
        inner = self.ops.gated_activation(gate_up=gate_up, activation=self.kernel.spec.activation)
        outputs = self._product(inner, ids, packed, self.down, places, adapters)
        weighted = outputs.view(*routing.weights.shape, -1).float() * routing.weights.float().unsqueeze(-1)
        return weighted.sum(dim=1).to(x.dtype)

    def _product(
        self, x: Tensor, ids: Tensor, packed: Any, site: AdapterSite, places: Tensor, adapters: StepAdapters
    ) -> Tensor:
        y = self.kernel.product(x, ids, packed, "gate_up" if site is self.gate_up else "down")
        return self.ops.add_low_rank(x=x, y=y, stack=adapters.stacks[site.index], slots=places)
