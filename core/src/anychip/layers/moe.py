"""A mixture of experts: which of them a rank holds, how they are read, and how a step goes through them. How tokens
travel to other ranks is layers/travel.py's, and which slot an expert lies in is layers/expert_slots.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Protocol

import torch
from torch import Tensor

from anychip.errors import Unsupported
from anychip.layers.adapted_experts import AdaptedExperts
from anychip.layers.build import Builder
from anychip.layers.expert_slots import ExpertSlots, check_experts, expert_placement
from anychip.layers.linear import ReplicatedLinear
from anychip.layers.travel import Travel, over_lanes
from anychip.plugin_api import (
    ActFormat,
    ExpertParallel,
    ForwardContext,
    MoESpec,
    Span,
    StepAdapters,
    WeightView,
)
from anychip.weights.matrix import Matrix


class SharedExpert(Protocol):
    """What every token goes through."""

    def partial(self, x: Tensor, adapters: StepAdapters | None) -> Tensor:
        """This rank's part of the sum over ranks."""
        ...


class SparseMoE:
    """A rank holds its share of the experts along ep, and of each its share of the intermediate features along tp;
    outputs are summed over both. Where ep covers tp, it holds whole experts, and the one sum along tp adds what every
    rank's experts make of all tokens. With `travel`, tokens travel instead (docs/decisions/0059): where experts may
    move between steps, and where the ranks are those of several lanes.

    `names` are those of the expert's gate, up and down matrices; the gate's is "" where there is none. `shared` is an
    expert that every token goes through; `shared_gate` names the module that weights it, if one does. `correction`
    names the tensor [num_experts] that is added to the scores for picking, where MoESpec.router_bias says that there
    is one.
    """

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        spec: MoESpec,
        intermediate_size: int,
        router: str = "gate",
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        router_bias: bool = False,
        correction: str = "",
        shared: SharedExpert | None = None,
        shared_gate: str = "",
    ) -> None:
        shape = builder.mesh.shape
        placed = expert_placement(shape)
        check_experts(spec.num_experts, shape, f"experts of {name}")
        extents = (spec.num_experts, intermediate_size, spec.hidden_size)
        self.held, span, _ = builder.held(extents, placed, f"expert features of {name}")
        assert span.count == spec.intermediate_size
        self.communicator = builder.mesh.axis("tp")
        self.router = ReplicatedLinear(
            replace(builder, formats=builder.formats.for_router()),
            name=f"{name}.{router}",
            in_features=spec.hidden_size,
            out_features=spec.num_experts,
            bias=router_bias,
            adapts=True,
        )
        self.shared = shared
        self.shared_gate: ReplicatedLinear | None = None
        if shared_gate:
            plain = replace(builder, formats=builder.formats.for_router())
            module = f"{name}.{shared_gate}"
            self.shared_gate = ReplicatedLinear(plain, name=module, in_features=spec.hidden_size, out_features=1)
        self.correction: Tensor | None = None
        if spec.router_bias:
            self.correction = self._wanted(builder, f"{name}.{correction}", spec.num_experts)
        # One scheme for gate, up and down: its groups divide the features of both.
        modules = self.modules(f"{name}.experts", spec.num_experts, names)
        scheme = builder.scheme(modules, gcd(spec.hidden_size, intermediate_size))
        self.spec = replace(spec, scheme=scheme, placed=placed)
        self.ep: ExpertParallel | None = None
        self.expert_map: Tensor | None = None
        self.slots: ExpertSlots | None = None
        if shape.size_of("ep") > 1:
            self._spread(builder, f"{name}.experts")
        self.kernel = builder.platform.moe(self.spec)
        builder.expert_layers.append(self)
        self.travel: Travel | None = None
        if self.slots is not None and self.ep is not None:
            self.travel = Travel.of(builder.platform, self.kernel, self.slots, self.ep, self.communicator)
        self.packed = self.kernel.begin()
        self.want_experts(builder, f"{name}.experts", intermediate_size, span, names)
        self.adapted: AdaptedExperts | None = None
        if builder.takes("experts"):
            self._adapt(builder, f"{name}.experts", intermediate_size, span, names)
        builder.weights.finishers.append(self._finish)

    def modules(self, name: str, count: int, names: tuple[str, str, str]) -> list[str]:
        """What a checkpoint calls the matrices of `count` experts."""
        return [f"{name}.{expert}.{part}" for expert in range(count) for part in names if part]

    def want_experts(
        self, builder: Builder, name: str, intermediate_size: int, span: Span, names: tuple[str, str, str]
    ) -> None:
        """Asks for the matrices of the experts that this rank holds; a family that stacks experts in one tensor
        overrides this."""
        spec = self.spec
        hidden = Span(0, spec.hidden_size)
        wide, tall = (intermediate_size, spec.hidden_size), (spec.hidden_size, intermediate_size)
        for place, expert in enumerate(range(*self.held.bounds)):
            for part, module in zip(("gate", "up", "down"), names, strict=True):
                if not module:
                    continue
                down = part == "down"
                builder.formats.want(
                    builder.weights,
                    Matrix(
                        name=f"{name}.{expert}.{module}",
                        shape=tall if down else wide,
                        rows=hidden if down else span,
                        columns=span if down else hidden,
                        scheme=spec.scheme,
                        put=PutExpert(self, place, part),
                    ),
                )

    def _adapt(
        self, builder: Builder, name: str, intermediate_size: int, span: Span, names: tuple[str, str, str]
    ) -> None:
        """Notes where adapters of the experts held here go, by the names of experts that are modules each."""
        why = "" if self.kernel.has_products else f"the kernel {self.kernel.name} has no products by expert"
        if builder.mesh.shape.size_of("ep") > 1:
            why = "experts are spread over ranks"
        if why:
            what = f"adapters of experts: {why}; leave experts out of --adapter-targets, or adapters of them"
            raise Unsupported(builder.platform.name, [what])
        gate, up, down = names
        modules = [(f"{name}.{e}.{gate}", f"{name}.{e}.{up}", f"{name}.{e}.{down}") for e in range(*self.held.bounds)]
        self.adapted = AdaptedExperts(builder, self.kernel, modules, intermediate_size, span)

    @staticmethod
    def _wanted(builder: Builder, name: str, size: int) -> Tensor:
        """A vector [size], float32 as the scores are."""
        held = builder.platform.empty((size,), "float32", "weights")

        def take(view: WeightView) -> None:
            held.copy_(view.read((0, size)))

        builder.weights.want(name, (size,), take)
        return held

    def _spread(self, builder: Builder, name: str) -> None:
        """Experts lie on several ranks: what finds them, and what is not to be read here."""
        shape, held, num_spare = builder.mesh.shape, self.held.count, 0
        if builder.moves_experts or over_lanes(shape):
            num_spare = builder.num_redundant_experts // shape.size_of("ep")
            self.slots = ExpertSlots(
                builder.platform,
                num_experts=self.spec.num_experts,
                num_ranks=shape.size_of("ep"),
                num_spare=num_spare,
            )
        else:
            self.expert_map = self._expert_map(builder)
        self.spec = replace(self.spec, num_local_experts=held + num_spare)
        if self.slots is not None or not shape.covers("ep", "tp"):
            self.ep = ExpertParallel(communicator=builder.mesh.axis("ep"), num_local_experts=held + num_spare)
        self._leave_out_others(builder, name)

    def _expert_map(self, builder: Builder) -> Tensor:
        """[num_experts]: an expert's place among those held here, -1 for one that is elsewhere."""
        places = torch.full((self.spec.num_experts,), -1)
        places[slice(*self.held.bounds)] = torch.arange(self.held.count)
        return builder.platform.empty(tuple(places.shape), "int64", "weights").copy_(places)

    def _leave_out_others(self, builder: Builder, name: str) -> None:
        """The checkpoint has them, and other ranks ask for them."""
        here = range(*self.held.bounds)
        builder.weights.elsewhere += tuple(f"{name}.{e}." for e in range(self.spec.num_experts) if e not in here)

    def _finish(self) -> None:
        self.packed = self.kernel.finish(self.packed)

    @property
    def accepts(self) -> ActFormat:
        return self.router.accepts

    def __call__(self, x: Tensor, context: ForwardContext | None) -> Tensor:
        adapters = None if context is None else context.adapters
        logits = self.router(x, adapters)
        shared = None if self.shared is None else self._shared(self.shared, x, adapters)
        if self.travel is not None:
            routing = self.kernel.route(logits, self.correction)
            partial = self.travel.outputs(x, routing, None if context is None else context.routed, self.packed)
            return self.communicator.all_reduce(partial if shared is None else partial + shared)
        if adapters is not None and self.adapted is not None:
            partial = self.adapted(x, self.kernel.route(logits, self.correction), self.packed, adapters)
            return self.communicator.all_reduce(partial if shared is None else partial + shared)
        partial = self.kernel.apply(
            x,
            logits,
            self.packed,
            router_bias=self.correction,
            shared=shared,
            ep=self.ep,
            expert_map=self.expert_map,
        )
        return self.communicator.all_reduce(partial)

    def join(self) -> None:
        """Serves other ranks' tokens in a step for which this rank has none. Tokens travel."""
        assert self.travel is not None
        self.travel.join(self.packed)

    def _shared(self, shared: SharedExpert, x: Tensor, adapters: StepAdapters | None) -> Tensor:
        """This rank's part of what every token gets."""
        partial = shared.partial(x, adapters)
        return partial if self.shared_gate is None else partial * self.shared_gate(x).sigmoid()


def travelling_layers(model: object) -> list[SparseMoE]:
    """A built model's mixtures to whose experts tokens travel, in the order in which they run."""
    layers = getattr(model, "expert_layers", ())
    return [layer for layer in layers if isinstance(layer, SparseMoE) and layer.travel is not None]


@dataclass(frozen=True, slots=True)
class PutExpert:
    """weights.matrix.Put for one part of an expert, which is counted among those of this rank."""

    layer: SparseMoE
    expert: int
    part: str

    def __call__(self, kind: str, tensor: Tensor, row: int = 0) -> None:
        part = f"{self.part}.{kind}" if kind else self.part
        self.layer.kernel.load(self.layer.packed, self.expert, part, tensor, row=row)
