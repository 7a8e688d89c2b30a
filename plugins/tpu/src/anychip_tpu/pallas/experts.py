"""The experts of a layer: rows sorted by expert, two grouped products with an activation between, and their sums by
token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from anychip_tpu.pallas.generations import Generation
from anychip_tpu.pallas.grouped_matmul import grouped_matmul

Array = jax.Array
_LIMIT, _SLOPE = 7.0, 1.702
"""Of swiglu_clamped, as GPT-OSS has it."""


def experts(
    x: Array,
    ids: Array,
    weights: Array,
    gate_up: Array,
    down: Array,
    gate_up_bias: Array | None = None,
    down_bias: Array | None = None,
    *,
    num_experts: int,
    activation: str,
    chip: Generation,
    axis: str | tuple[str, ...] | None = None,
    interpret: Any = False,
) -> Array:
    """[num_tokens, hidden_size]: each token's picked experts, weighted and summed.

    x [num_tokens, hidden_size]; ids, weights [num_tokens, top_k]; gate_up [num_here, 2 * intermediate, hidden_size];
    down [num_here, hidden_size, intermediate]; biases [num_here, ...]. With `axis`, this is one device of a mesh, which
    holds its part of the experts along that axis, and the devices' sums are added.
    """
    (num_tokens, top_k), num_here = ids.shape, gate_up.shape[0]
    first = 0 if axis is None else lax.axis_index(axis) * num_here
    chosen = ids.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(chosen, stable=True)
    token = order // top_k
    sizes = jnp.sum(chosen[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    local = chosen[order] - first
    here = (local >= 0) & (local < num_here)
    local = jnp.where(here, local, 0)

    hidden = grouped_matmul(x[token], gate_up, sizes, chip=chip, first_group=first, interpret=interpret)
    if gate_up_bias is not None:
        hidden = hidden + gate_up_bias[local].astype(hidden.dtype)
    hidden = gated(hidden, activation)
    out = grouped_matmul(hidden, down, sizes, chip=chip, first_group=first, interpret=interpret)
    if down_bias is not None:
        out = out + down_bias[local].astype(out.dtype)
    share = weights.reshape(-1)[order].astype(jnp.float32)[:, None]
    # A bias must not count on a device that does not hold the expert.
    out = jnp.where(here[:, None], out.astype(jnp.float32) * share, 0.0)
    total = jnp.zeros((num_tokens, x.shape[1]), jnp.float32).at[token].add(out)
    return (total if axis is None else lax.psum(total, axis)).astype(x.dtype)


def gated(gate_up: Array, activation: str) -> Array:
    """[rows, 2 * intermediate] to [rows, intermediate]."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    if activation == "silu":
        result = jax.nn.silu(gate) * up
    elif activation == "gelu_tanh":
        result = jax.nn.gelu(gate, approximate=True) * up
    elif activation == "swiglu_clamped":
        gate, up = jnp.minimum(gate, _LIMIT), jnp.clip(up, -_LIMIT, _LIMIT)
        result = (up + 1) * (gate * jax.nn.sigmoid(_SLOPE * gate))
    else:
        raise ValueError(f"activation {activation!r}; expected silu, gelu_tanh or swiglu_clamped")
    return result.astype(gate_up.dtype)
