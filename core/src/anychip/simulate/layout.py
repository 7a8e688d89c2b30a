"""How a model lies over devices: ranks of tensor parallelism, stages, lanes, experts."""

from __future__ import annotations

from dataclasses import dataclass

from anychip.errors import ConfigError
from anychip.simulate.accelerator import Accelerator
from anychip.simulate.shape import ModelShape

_RESERVED = 0.9
"""The share of a device's memory that weights and cache may take; the rest is for activations and graphs."""

_CACHE_BYTES = 2
"""Of an element: bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`tp` ranks divide each layer of a lane, `pp` stages divide a lane's layers, `dp` lanes have requests of their
    own. With `spread_experts` the experts of a layer lie over all ranks of all lanes; without, each lane has them all,
    divided by tp."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    spread_experts: bool = False

    def __post_init__(self) -> None:
        sizes = {"tensor_parallel_size": self.tp, "pipeline_parallel_size": self.pp, "data_parallel_size": self.dp}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name} is {size}; expected 1 or more")

    @property
    def num_devices(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def expert_ranks(self) -> int:
        """Over how many devices the experts of a layer lie."""
        return self.tp * self.dp if self.spread_experts else self.tp


def check_layout(layout: Layout, shape: ModelShape) -> None:
    """Raises ConfigError for a model that cannot be divided so."""
    if layout.pp > shape.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size is {layout.pp}, and the model has {shape.num_layers} layers; give as many or fewer"
        )
    if layout.spread_experts and shape.experts is None:
        raise ConfigError("the model has no experts to spread; leave out --expert-parallel")
    if layout.spread_experts and shape.experts is not None and layout.expert_ranks > shape.experts.count:
        raise ConfigError(
            f"{layout.expert_ranks} devices share {shape.experts.count} experts of a layer; "
            f"use {shape.experts.count} devices at most"
        )


def weight_bytes(layout: Layout, shape: ModelShape) -> float:
    """Of the fullest device: one of the first or the last stage. Embedding and head are divided by tp."""
    layers = -(-shape.num_layers // layout.pp)
    dense = min(layers, shape.num_dense_layers)
    weights = layers * shape.attention / layout.tp + dense * shape.dense / layout.tp
    if shape.experts is not None:
        each = shape.experts.count * shape.experts.each / layout.expert_ranks
        weights += (layers - dense) * (each + shape.experts.shared / layout.tp + shape.experts.router)
    ends = shape.head + shape.embedding if layout.pp == 1 else shape.head
    return shape.element_bytes * weights + 2.0 * ends / layout.tp


def token_bytes(layout: Layout, shape: ModelShape) -> float:
    """Of one token in the cache of one device."""
    layers = -(-shape.num_layers // layout.pp)
    return layers * _CACHE_BYTES * shape.cache_elements / min(layout.tp, shape.cache_parts)


def cache_tokens(layout: Layout, shape: ModelShape, accelerator: Accelerator) -> int:
    """Tokens that the cache of one lane holds. Raises ConfigError where the weights leave no room."""
    memory = _RESERVED * accelerator.memory_gib * 2**30
    weights = weight_bytes(layout, shape)
    if weights >= memory:
        raise ConfigError(
            f"the weights take {weights / 2**30:.1f} GiB of each device, and {accelerator.name} has "
            f"{memory / 2**30:.1f} GiB for them; divide them over more devices"
        )
    return int((memory - weights) / token_bytes(layout, shape))
