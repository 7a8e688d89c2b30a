"""Seconds of a step: a roofline over a model's parts, or a table that was measured.

A part takes as long as the slower of its bytes and its products, and a kernel's own time for each of its kernels.
Nothing else is known of kernels here: what a real one loses in tails, in waiting and in unlike rows is in the rates of
the accelerator, or is missing. The documents say how far that is from what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from anychip.errors import ConfigError
from anychip.simulate.accelerator import Accelerator, Link
from anychip.simulate.layout import Layout
from anychip.simulate.shape import Experts, ModelShape
from anychip.speculation.lengths import StepCosts

_KERNELS = 8
"""Of one layer: two norms, projections, attention, output, the MLP's two products and its activation."""

_ACTIVATION_BYTES = 2
"""Of an element that ranks exchange: bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneWork:
    """What one lane computes in a step. `cached` counts tokens that are read: for each row, those before its chunk and
    the chunk itself. `pairs` counts (query token, earlier token) pairs."""

    rows: int = 0
    tokens: int = 0
    cached: int = 0
    pairs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds, by part, of a step through all stages."""

    attention: float
    """Its projections and its scores."""
    mlp: float
    """Dense MLPs, or experts with their router."""
    head: float
    communication: float
    """What is not hidden behind computation."""

    @property
    def total(self) -> float:
        return self.attention + self.mlp + self.head + self.communication


class Costs(Protocol):
    def step(self, lanes: Sequence[LaneWork]) -> StepTime:
        """Of a step that all lanes take together: as long as the one that is busiest."""
        ...


class MeasuredCosts:
    """By the tokens of the busiest lane, from (tokens, seconds) pairs. What a longer context costs is not in them."""

    def __init__(self, measured: Sequence[tuple[int, float]]) -> None:
        self._seconds = StepCosts(measured)

    def step(self, lanes: Sequence[LaneWork]) -> StepTime:
        seconds = self._seconds(max(lane.tokens for lane in lanes))
        return StepTime(attention=0.0, mlp=seconds, head=0.0, communication=0.0)


def read_costs(path: Path) -> MeasuredCosts:
    """From a JSON file of [tokens, seconds] pairs. Raises ConfigError for anything else."""
    try:
        measured = msgspec.json.decode(path.read_bytes(), type=list[tuple[int, float]])
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); --step-costs takes a JSON file") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} holds no [tokens, seconds] pairs: {error}") from error
    tokens = [count for count, _ in measured]
    if not measured or tokens != sorted(set(tokens)) or tokens[0] < 1 or min(seconds for _, seconds in measured) <= 0:
        raise ConfigError(f"{path} has tokens {tokens}; they must grow from 1 or more, and seconds be more than 0")
    return MeasuredCosts(measured)


class RooflineCosts:
    """`imbalance`: tokens of the busiest expert rank over the mean. It is 1 where an expert balancer does its work."""

    def __init__(self, shape: ModelShape, layout: Layout, accelerator: Accelerator, imbalance: float = 1.0) -> None:
        if imbalance < 1:
            raise ConfigError(
                f"imbalance is {imbalance}; expected 1 or more, for the busiest rank has the mean at least"
            )
        self._shape = shape
        self._layout = layout
        self._on = accelerator
        self._imbalance = imbalance

    def step(self, lanes: Sequence[LaneWork]) -> StepTime:
        shape, layout = self._shape, self._layout
        busiest = max(lanes, key=self._attention)
        together = sum(lane.tokens for lane in lanes)
        num_experts = shape.num_layers - shape.num_dense_layers
        mlp = shape.num_dense_layers * max(self._dense(lane.tokens) for lane in lanes)
        if shape.experts is not None:
            mlp += num_experts * self._experts(shape.experts, busiest.tokens, together)
        head = self._product(shape.head / layout.tp, max(lane.rows for lane in lanes), 2.0, "bfloat16")
        told = shape.num_layers * self._between_ranks(busiest.tokens) + self._between_stages(busiest.tokens)
        if shape.experts is not None and layout.spread_experts:
            told += num_experts * self._between_experts(shape.experts, busiest.tokens)
        return StepTime(
            attention=shape.num_layers * (self._attention(busiest) + _KERNELS / 2 * self._kernel_s),
            mlp=mlp + shape.num_layers * _KERNELS / 2 * self._kernel_s,
            head=head,
            communication=told * (1 - self._on.overlap),
        )

    @property
    def _kernel_s(self) -> float:
        return 1e-6 * self._on.kernel_us

    def _product(self, weights: float, tokens: float, element_bytes: float, dtype: str) -> float:
        """Of a matrix of so many weights with so many rows."""
        return self._slower(weights * element_bytes, 2 * weights * tokens, dtype)

    def _slower(self, nbytes: float, flops: float, dtype: str) -> float:
        return max(nbytes / (1e9 * self._on.read_gb_per_s), flops / self._on.rate(dtype))

    def _attention(self, lane: LaneWork) -> float:
        shape, layout = self._shape, self._layout
        projections = self._product(shape.attention / layout.tp, lane.tokens, shape.element_bytes, shape.dtype)
        kept = 2 * shape.cache_elements / min(layout.tp, shape.cache_parts)
        scores = self._slower(lane.cached * kept, lane.pairs * shape.score_flops / layout.tp, "bfloat16")
        return projections + scores

    def _dense(self, tokens: int) -> float:
        shape = self._shape
        return self._product(shape.dense / self._layout.tp, tokens, shape.element_bytes, shape.dtype)

    def _experts(self, experts: Experts, tokens: int, together: int) -> float:
        """`together` tokens of all lanes meet experts that are spread; without, only the lane's own `tokens` do."""
        shape, layout = self._shape, self._layout
        routed = together if layout.spread_experts else tokens
        ranks = layout.expert_ranks
        read = experts.count * (1 - (1 - experts.top_k / experts.count) ** routed)  # those that anybody chose
        pairs = self._imbalance * routed * experts.top_k / ranks
        each = self._slower(shape.element_bytes * experts.each * read / ranks, 2 * experts.each * pairs, shape.dtype)
        shared = self._product(experts.shared / layout.tp, tokens, shape.element_bytes, shape.dtype)
        return each + shared + self._product(experts.router, tokens, 2.0, "bfloat16")

    def _link(self, ranks: int) -> Link:
        return self._on.node if ranks <= self._on.devices_per_node else self._on.network

    def _between_ranks(self, tokens: int) -> float:
        """Two sums of a layer over the ranks of tp: each moves 2 (n - 1) / n of its rows over a rank's link."""
        ranks = self._layout.tp
        if ranks == 1:
            return 0.0
        link = self._link(ranks)
        nbytes = _ACTIVATION_BYTES * tokens * self._shape.hidden_size
        sums = 1 if self._layout.spread_experts and self._shape.experts is not None else 2
        return sums * (2 * (ranks - 1) / ranks * nbytes / (1e9 * link.gb_per_s) + 2e-6 * link.latency_us)

    def _between_experts(self, experts: Experts, tokens: int) -> float:
        """A token's row goes to the ranks of its experts and back: there in the weights' type, back in bfloat16. A
        rank of another node is reached over the network, and gets a row once however many of its experts are chosen.
        """
        shape, ranks = self._shape, self._layout.expert_ranks
        if ranks == 1:
            return 0.0
        nodes = max(1, ranks // self._on.devices_per_node)
        reached = nodes * (1 - (1 - 1 / nodes) ** experts.top_k)
        far = min(reached, experts.most_groups or reached) * (nodes - 1) / nodes  # other nodes that a token reaches
        near = ranks * (1 - (1 - 1 / ranks) ** experts.top_k)
        own = tokens / self._layout.tp  # the lane's ranks share its tokens
        row = shape.hidden_size * (min(2.0, shape.element_bytes) + _ACTIVATION_BYTES)
        seconds = own * near * row / (1e9 * self._on.node.gb_per_s) + 2e-6 * self._on.node.latency_us
        if nodes > 1:
            seconds = max(seconds, own * far * row / (1e9 * self._on.network.gb_per_s))
            seconds += 2e-6 * self._on.network.latency_us
        return seconds

    def _between_stages(self, tokens: int) -> float:
        layout = self._layout
        if layout.pp == 1:
            return 0.0
        link = self._link(layout.tp * layout.pp)
        nbytes = _ACTIVATION_BYTES * tokens * self._shape.hidden_size / layout.tp
        return (layout.pp - 1) * (nbytes / (1e9 * link.gb_per_s) + 1e-6 * link.latency_us)
