"""The recurrences of state layers, token by token in float64, and how far an honest backend may be from them.

Numbers that decay by themselves carry their rounding errors along in proportion to their sizes. A delta rule with keys
of length 1 and rates of 1 at most turns no column of its state longer, so an error grows by what each token adds to it.
A form that looks at many tokens at once sums the logarithms of their decays, and the sum rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from anychip_conformance.oracle.rounding import gamma
from anychip_conformance.oracle.vectorised import Bounded

Array = np.ndarray
Given = Mapping[str, Array]

_TOGETHER = 64
"""Tokens that a chunked form may look at together."""
_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Advanced:
    """Outputs [tokens, ...], and the state after the last one; both with their bounds."""

    output: Bounded
    state: Bounded


@dataclass(frozen=True, slots=True)
class Token:
    """What one token makes of the state: the state and the output behind it, and the sizes of what each is summed of.
    `decay` is the largest logarithm of a decay, without its sign."""

    state: Array
    output: Array
    state_size: Array
    output_size: Array
    decay: float


Step = Callable[[Array, Array, Given, Given], Token]
"""(state, sizes of what it was summed of, inputs of a token, weights)"""


def advanced(recurrence: str, inputs: Given, weights: Given, first: Array) -> Advanced:
    """`first` is the state before the first token, whole: zeros of a fresh sequence."""
    step, state, size = STEPS[recurrence], first, np.abs(first)
    outputs, bounds, decays = [], [], list[float]()
    count = len(next(iter(inputs.values())))
    growth = 0.0
    for at in range(count):
        token = step(state, size, {name: given[at] for name, given in inputs.items()}, weights)
        decays.append(token.decay)
        growth = gamma(8.0 * (at + 2) + _TOGETHER * (2.0 + sum(decays[-_TOGETHER:])))
        outputs.append(token.output)
        bounds.append(token.output_size * growth)
        state, size = token.state, token.state_size
    return Advanced(Bounded(np.stack(outputs), np.stack(bounds)), Bounded(state, size * growth))


def _gated_sum(state: Array, size: Array, inputs: Given, weights: Given) -> Token:
    x, gate = inputs["x"], inputs["gate"]
    state, size = gate * state + x, np.abs(gate) * size + np.abs(x)
    return Token(state, state, size, size, 0.0)


def _causal_conv(state: Array, size: Array, inputs: Given, weights: Given) -> Token:
    seen, weight = np.concatenate((state, inputs["x"][None])), weights["weight"].T
    output, sizes = (seen * weight).sum(axis=0), np.abs(seen * weight).sum(axis=0)
    if "bias" in weights:
        output, sizes = output + weights["bias"], sizes + np.abs(weights["bias"])
    return Token(seen[1:], output, np.zeros_like(size), sizes, 0.0)  # a copy of inputs has no error


def _selective_scan(state: Array, size: Array, inputs: Given, weights: Given) -> Token:
    dt, x = inputs["dt"][:, None], inputs["x"][:, None]
    decay, added = np.exp(dt * weights["a"]), dt * x * inputs["b"]
    state, size = decay * state + added, decay * size + np.abs(added)
    skipped = weights["d"] * inputs["x"]
    output = (state * inputs["c"]).sum(axis=-1) + skipped
    sizes = (size * np.abs(inputs["c"])).sum(axis=-1) + np.abs(skipped)
    return Token(state, output, size, sizes, float(np.abs(dt * weights["a"]).max()))


def _ssd(state: Array, size: Array, inputs: Given, weights: Given) -> Token:
    repeats = len(inputs["x"]) // len(inputs["b"])
    b, c = (np.repeat(inputs[name], repeats, axis=0)[:, None, :] for name in ("b", "c"))
    log = inputs["dt"] * weights["a"]
    decay, added = np.exp(log)[:, None, None], inputs["dt"][:, None, None] * inputs["x"][..., None] * b
    state, size = decay * state + added, decay * size + np.abs(added)
    skipped = weights["d"][:, None] * inputs["x"]
    output = (state * c).sum(axis=-1) + skipped
    return Token(state, output, size, (size * np.abs(c)).sum(axis=-1) + np.abs(skipped), float(np.abs(log).max()))


def _lightning(state: Array, size: Array, inputs: Given, weights: Given) -> Token:
    decay, added = np.exp(-weights["slope"])[:, None, None], inputs["k"][..., None] * inputs["v"][:, None, :]
    state, size = decay * state + added, decay * size + np.abs(added)
    output = np.einsum("hk,hkv->hv", inputs["q"], state)
    sizes = np.einsum("hk,hkv->hv", np.abs(inputs["q"]), size)
    return Token(state, output, size, sizes, float(weights["slope"].max()))


def _delta(state: Array, size: Array, q: Array, k: Array, v: Array, g: Array, a: Array, b: Array) -> Token:
    """S = exp(g) S + a (b S) + k v^T. Sizes are lengths of columns, [heads, 1, value_dim] spread over the keys."""
    read = np.einsum("hk,hkv->hv", b, state)
    after = np.exp(g)[..., None] * state + a[..., None] * read[:, None, :] + k[..., None] * v[:, None, :]
    lengths = (
        np.linalg.norm(state, axis=1) + np.linalg.norm(after, axis=1) + np.linalg.norm(k, axis=1)[:, None] * np.abs(v)
    )
    size = np.maximum(size, 0.0).max(axis=1) + lengths  # [heads, value_dim]
    output = np.einsum("hk,hkv->hv", q, after)
    sizes = np.linalg.norm(q, axis=1)[:, None] * size
    return Token(after, output, np.repeat(size[:, None, :], state.shape[1], axis=1), sizes, float(np.abs(g).max()))


def _kda(state: Array, size: Array, inputs: Given, weights: Given) -> Token:
    q, k = (x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + _EPS) for x in (inputs["q"], inputs["k"]))
    written = inputs["beta"][:, None] * k
    q, g = q / np.sqrt(q.shape[-1]), inputs["g"]
    return _delta(state, size, q, written, inputs["v"], g, -written, np.exp(g) * k)


def _gated_delta(state: Array, size: Array, inputs: Given, weights: Given) -> Token:
    repeats = len(inputs["v"]) // len(inputs["q"])
    q, k = (np.repeat(inputs[name], repeats, axis=0) for name in ("q", "k"))
    g = np.repeat(inputs["g"][:, None], k.shape[1], axis=1)
    return _kda(state, size, {**inputs, "q": q, "k": k, "g": g}, weights)


def _wkv7(state: Array, size: Array, inputs: Given, weights: Given) -> Token:
    return _delta(state, size, *(inputs[name] for name in ("q", "k", "v", "g", "a", "b")))


STEPS: Mapping[str, Step] = {
    "gated_sum": _gated_sum,
    "causal_conv": _causal_conv,
    "selective_scan": _selective_scan,
    "ssd": _ssd,
    "lightning": _lightning,
    "gated_delta": _gated_delta,
    "kda": _kda,
    "wkv7": _wkv7,
}
