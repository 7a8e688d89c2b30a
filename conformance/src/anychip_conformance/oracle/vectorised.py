"""The oracle that verdicts come from: numpy in float64, whole arrays at a time. Each function gives the result and, by
element, how far an honest backend may be from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from anychip_conformance.oracle.rounding import SMALLEST, U32, UNIT_ROUNDOFF, gamma, rounded

Array = np.ndarray
SWIGLU_LIMIT, SWIGLU_SLOPE = 7.0, 1.702


@dataclass(frozen=True, slots=True)
class Bounded:
    """A result, and the largest error allowed by element."""

    value: Array
    bound: Array

    def widened(self, times: float) -> Bounded:
        return Bounded(self.value, self.bound * times)


# -- single ops ---------------------------------------------------------------------------------------------


def rms_norm(x: Array, weight: Array, eps: float, unit_offset: bool, dtype: str) -> Bounded:
    scale = 1.0 + weight if unit_offset else weight
    value = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale
    # Half the roundings of the sum reach the root; then the root, two products, two results in the dtype.
    return Bounded(value, np.abs(value) * gamma(x.shape[-1] / 2 + 6) + rounded(value, dtype, times=2))


def rotary(x: Array, cos: Array, sin: Array, positions: Array, interleaved: bool, dtype: str) -> Bounded:
    """x [tokens, heads, dim]; cos and sin [max_positions, rotary_dim / 2]."""
    half = cos.shape[1]
    c, s = cos[positions][:, None, :], sin[positions][:, None, :]
    place = np.arange(2 * half).reshape(half, 2).T if interleaved else np.arange(2 * half).reshape(2, half)
    a, b = x[..., place[0]], x[..., place[1]]
    value, magnitude = x.copy(), np.zeros_like(x)
    value[..., place[0]], value[..., place[1]] = a * c - b * s, b * c + a * s
    magnitude[..., place[0]] = np.abs(a * c) + np.abs(b * s)
    magnitude[..., place[1]] = np.abs(b * c) + np.abs(a * s)
    bound = magnitude * gamma(3) + rounded(value, dtype)
    bound[..., 2 * half :] = 0.0  # passed through
    return Bounded(value, bound)


def gated_activation(gate: Array, up: Array, activation: str, dtype: str) -> Bounded:
    """Every elementary step may round to the dtype, or flush what is too small for it."""
    u = UNIT_ROUNDOFF[dtype]
    if activation == "swiglu_clamped":
        gate, up = np.minimum(gate, SWIGLU_LIMIT), np.clip(up, -SWIGLU_LIMIT, SWIGLU_LIMIT)
        value = (up + 1) * gate / (1 + np.exp(-SWIGLU_SLOPE * gate))
        relative = gamma(6, u) + SWIGLU_SLOPE * np.abs(gate) * gamma(2, u)
        absolute = np.abs(gate) * gamma(2, u)  # of up + 1 where it cancels
        flushed = (np.abs(up) + 1) * SMALLEST[dtype]
        return Bounded(value, np.abs(value) * relative + absolute + flushed + rounded(value, dtype))
    act = activate(gate, activation)
    value = act * up
    # x sigmoid(x): the exponential's argument is exact, or rounded in float32. The tanh of gelu may cancel.
    inner = np.abs(gate) * (gamma(8) if activation == "gelu_tanh" else 0.0)
    bound = np.abs(up) * (np.abs(act) * (gamma(3, u) + gamma(8) * (1 + np.abs(gate))) + inner)
    return Bounded(value, bound + np.abs(up) * SMALLEST[dtype] + rounded(value, dtype))


def activate(x: Array, activation: str) -> Array:
    """silu or gelu_tanh."""
    if activation == "silu":
        return x / (1 + np.exp(-x))
    assert activation == "gelu_tanh", activation
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softcap(x: Array, cap: float, dtype: str) -> Bounded:
    u = UNIT_ROUNDOFF[dtype]
    value = cap * np.tanh(x / cap)
    slope = 1 - np.tanh(x / cap) ** 2
    flushed = 2 * cap * SMALLEST[dtype]  # of x / cap and its tanh
    return Bounded(value, np.abs(x) * slope * gamma(2, u) + flushed + rounded(value, dtype, times=3))


def log_softmax(x: Array) -> Bounded:
    top = x.max(-1, keepdims=True)
    shifted = x - top
    value = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    finite = np.where(np.isfinite(x), np.abs(x), 0.0)
    return Bounded(value, 4 * U32 * (finite + np.abs(top)) + gamma(x.shape[-1] + 8))


# -- matrix products ----------------------------------------------------------------------------------------


def linear(
    x: Array, weight: Array, bias: Array | None, dtype: str, *, dx: Array | float = 0.0, dw: float = 0.0
) -> Bounded:
    """x W^T + b. `dx` is the absolute error of x by element, `dw` the relative one of the weights."""
    value = x @ weight.T
    magnitude = np.abs(x) @ np.abs(weight).T
    bound = magnitude * (gamma(x.shape[-1] + 2) + dw) + np.broadcast_to(dx, x.shape) @ np.abs(weight).T * (1 + dw)
    bound = bound + rounded(value, dtype)
    if bias is not None:
        value = value + bias
        bound = bound + rounded(value, dtype)
    return Bounded(value, bound)


@dataclass(frozen=True, slots=True)
class Route:
    weights: Array  # [tokens, top_k]
    ids: Array  # [tokens, top_k]
    bound: Array  # of weights


def route(
    logits: Array,
    bias: Array | None,
    *,
    top_k: int,
    scoring: str,
    renormalize: bool,
    num_groups: int,
    top_groups: int,
    scale: float,
) -> Route:
    """Experts in the order of their score, the lower id first among equals."""
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    scores = exp / exp.sum(-1, keepdims=True) if scoring == "softmax" else 1 / (1 + np.exp(-logits))
    picking = scores if bias is None else scores + bias
    if num_groups > 1:
        grouped = picking.reshape(len(logits), num_groups, -1)
        best = grouped.max(-1) if bias is None else np.sort(grouped, axis=-1)[..., -2:].sum(-1)
        kept = np.zeros(best.shape, dtype=bool)
        np.put_along_axis(kept, np.argsort(-best, axis=-1, kind="stable")[:, :top_groups], True, axis=-1)
        picking = np.where(kept[..., None], grouped, -np.inf).reshape(picking.shape)
    ids = np.argsort(-picking, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, ids, axis=-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdims=True)
    growth = gamma(logits.shape[-1] + 8) + 4 * U32 * np.abs(logits).max(-1, keepdims=True)
    return Route(weights * scale, ids, np.abs(weights * scale) * 2 * growth)


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert's weights, as the backend sees them; `dw` is their relative error after a rounding to the dtype."""

    gate: Array
    up: Array
    down: Array
    gate_bias: Array | None = None
    up_bias: Array | None = None
    down_bias: Array | None = None


def run_expert(
    x: Array,
    expert: Expert,
    activation: str,
    dtype: str,
    *,
    dw: float = 0.0,
    rounding: Callable[[Array], Array | float] = lambda x: 0.0,
) -> Bounded:
    """`rounding` gives what a scheme's rounding of activations may cost, by element."""
    gate = linear(x, expert.gate, expert.gate_bias, dtype, dx=rounding(x), dw=dw)
    up = linear(x, expert.up, expert.up_bias, dtype, dx=rounding(x), dw=dw)
    hidden = gated(gate, up, activation, dtype)
    dx = hidden.bound + rounding(np.abs(hidden.value) + hidden.bound)
    return linear(hidden.value, expert.down, expert.down_bias, dtype, dx=dx, dw=dw)


def gated(gate: Bounded, up: Bounded, activation: str, dtype: str) -> Bounded:
    """act(gate) * up of results of products."""
    made = gated_activation(gate.value, up.value, activation, dtype)
    # |act'| stays below 1.13 for silu and gelu, and below 1.2 for the clamped one, whose other factor is up + 1.
    factor = np.abs(up.value) + up.bound + (1.0 if activation == "swiglu_clamped" else 0.0)
    act_size = np.abs(gate.value) + gate.bound
    return Bounded(made.value, 1.2 * gate.bound * factor + up.bound * act_size + made.bound)


def combine(outputs: dict[int, Bounded], weights: Array, ids: Array, weight_bound: Array, dtype: str) -> Bounded:
    """Sum over a token's experts of weight x output. `outputs` by expert, for all tokens; others contribute nothing.
    An expert's share may be rounded to the dtype before the sum."""
    first = next(iter(outputs.values())).value
    value, bound = np.zeros_like(first), np.zeros_like(first)
    u = UNIT_ROUNDOFF[dtype]
    for choice in range(ids.shape[1]):
        for expert, output in outputs.items():
            picked = (ids[:, choice] == expert)[:, None]
            weight, slack = weights[:, choice, None], weight_bound[:, choice, None]
            value += np.where(picked, weight * output.value, 0.0)
            share = np.abs(weight) * output.bound + np.abs(output.value) * (slack + np.abs(weight) * gamma(3, u))
            bound += np.where(picked, share, 0.0)
    return Bounded(value, bound + rounded(value, dtype))


# -- sampling -----------------------------------------------------------------------------------------------


def truncated(probs: Array, *, top_k: int, top_p: float, min_p: float, slack: float = 0.0) -> Array:
    """One row's probabilities with what top-k, top-p and min-p exclude set to zero. `slack` moves both thresholds."""
    order = np.argsort(-probs, kind="stable")
    ranked = probs[order]
    if top_k > 0:
        ranked[top_k:] = 0.0
    before = np.cumsum(ranked) - ranked
    beyond = before >= top_p * ranked.sum() + slack
    beyond[0] = False  # the best is never excluded
    ranked = np.where(beyond, 0.0, ranked)
    ranked = np.where(ranked < min(1.0, min_p * (1 - slack)) * ranked[0], 0.0, ranked)
    kept = np.zeros_like(probs)
    kept[order] = ranked
    return kept


def acceptable_tokens(
    logits: Array, *, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float, slack: float
) -> set[int]:
    """The token drawn, and those that take its place when a probability or a threshold moves by `slack`."""
    if temperature == 0:
        return {int(np.argmax(logits))}
    scaled = logits / temperature
    exp = np.exp(scaled - scaled.max())
    probs = exp / exp.sum()
    accepted = set()
    for moved in (0.0, slack, -slack) if slack else (0.0,):
        weights = truncated(probs.copy(), top_k=top_k, top_p=top_p, min_p=min_p, slack=moved)
        cumulative = np.cumsum(weights)
        target = uniform * cumulative[-1]
        reached = (weights > 0) & (cumulative > target - slack) & (cumulative - weights <= target + slack)
        accepted.update(np.flatnonzero(reached).tolist() or [int(np.flatnonzero(weights)[-1])])
    return accepted


def philox_uniform(seed: int, sample_index: int, position: int, purpose: int = 0) -> float:
    """docs/reference/randomness.md, in Python's integers."""
    mask = 0xFFFFFFFF
    counter, key = [position & mask, sample_index & mask, purpose, 0], [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [second >> 32 ^ counter[1] ^ key[0], second & mask, first >> 32 ^ counter[3] ^ key[1], first & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return ((counter[0] >> 5) * 2**26 + (counter[1] >> 6)) / 2**53
