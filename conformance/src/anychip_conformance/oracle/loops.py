"""The second oracle: one number at a time, in the order that the definitions are written. Slow, and plain to check by
eye. It decides nothing; the suite's tests hold `vectorised` against it."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]
Matrix = Sequence[Vector]


def rms_norm(x: Vector, weight: Vector, eps: float, unit_offset: bool) -> list[float]:
    mean = math.fsum(value * value for value in x) / len(x)
    return [
        value / math.sqrt(mean + eps) * ((1 + factor) if unit_offset else factor)
        for value, factor in zip(x, weight, strict=True)
    ]


def rotary(x: Vector, cos: Vector, sin: Vector, interleaved: bool) -> list[float]:
    """One head of one token; cos and sin of its position."""
    out, half = list(x), len(cos)
    for pair in range(half):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        out[i] = x[i] * cos[pair] - x[j] * sin[pair]
        out[j] = x[j] * cos[pair] + x[i] * sin[pair]
    return out


def gated_activation(gate: float, up: float, activation: str) -> float:
    if activation == "silu":
        return gate / (1 + math.exp(-gate)) * up
    if activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)
        return 0.5 * gate * (1 + math.tanh(inner)) * up
    gate, up = min(gate, 7.0), max(-7.0, min(7.0, up))
    return (up + 1) * gate / (1 + math.exp(-1.702 * gate))


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def linear(x: Vector, weight: Matrix, bias: Vector | None) -> list[float]:
    return [dot(x, row) + (0.0 if bias is None else bias[i]) for i, row in enumerate(weight)]


def route(
    logits: Vector,
    bias: Vector | None,
    *,
    top_k: int,
    scoring: str,
    renormalize: bool,
    num_groups: int,
    top_groups: int,
    scale: float,
) -> list[tuple[int, float]]:
    """(expert, weight), the best first."""
    if scoring == "softmax":
        total = math.fsum(math.exp(value) for value in logits)
        scores = [math.exp(value) / total for value in logits]
    else:
        scores = [1 / (1 + math.exp(-value)) for value in logits]
    picking = [score + (0.0 if bias is None else bias[i]) for i, score in enumerate(scores)]
    size = len(logits) // num_groups
    groups = list(range(num_groups))
    if num_groups > 1:

        def worth(group: int) -> float:
            mine = sorted(picking[group * size : (group + 1) * size], reverse=True)
            return mine[0] if bias is None else mine[0] + mine[1]

        groups = sorted(groups, key=lambda group: -worth(group))[:top_groups]
    candidates = [expert for expert in range(len(logits)) if expert // size in groups]
    chosen = sorted(candidates, key=lambda expert: -picking[expert])[:top_k]
    total = math.fsum(scores[expert] for expert in chosen) if renormalize else 1.0
    return [(expert, scores[expert] / total * scale) for expert in chosen]


def attention(
    q: Vector,
    keys: Matrix,
    values: Matrix,
    *,
    position: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slope: float | None = None,
    sink: float | None = None,
) -> list[float]:
    """One head of one query at `position`, over the keys of its head at positions 0, 1, ..."""
    seen = _scored(q, keys, values, position, scale, window, softcap, slope)
    top = max(score for score, _ in seen)
    if sink is not None:
        top = max(top, sink)
    total = math.fsum(math.exp(score - top) for score, _ in seen)
    if sink is not None:
        total += math.exp(sink - top)
    return [math.fsum(math.exp(score - top) / total * value[i] for score, value in seen) for i in range(len(values[0]))]


def attention_lse(
    q: Vector,
    keys: Matrix,
    *,
    position: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slope: float | None = None,
    sink: float | None = None,
) -> float:
    """The logarithm of the sum of what `attention` divides by. Scores must be small."""
    seen = _scored(q, keys, keys, position, scale, window, softcap, slope)
    return math.log(math.fsum([math.exp(score) for score, _ in seen] + ([] if sink is None else [math.exp(sink)])))


def _scored(
    q: Vector,
    keys: Matrix,
    values: Matrix,
    position: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    slope: float | None,
) -> list[tuple[float, Vector]]:
    """The score and the value of every key that is seen."""
    seen: list[tuple[float, Vector]] = []
    for place, (key, value) in enumerate(zip(keys, values, strict=True)):
        if place > position or (window is not None and place <= position - window):
            continue
        score = dot(q, key) * scale
        if softcap is not None:
            score = softcap * math.tanh(score / softcap)
        if slope is not None:
            score -= slope * (position - place)
        seen.append((score, value))
    return seen


def draw(logits: Vector, *, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    top = max(logits)
    weights = [math.exp((value - top) / temperature) for value in logits]
    total = math.fsum(weights)
    probs = [weight / total for weight in weights]
    ranked = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    if top_k > 0:
        ranked = ranked[:top_k]
    mass, reached, kept = math.fsum(probs[token] for token in ranked), 0.0, []
    for token in ranked:
        if reached >= top_p * mass:
            break
        kept.append(token)
        reached += probs[token]
    kept = sorted(token for token in kept if probs[token] >= min_p * probs[ranked[0]])
    target, reached = uniform * math.fsum(probs[token] for token in kept), 0.0
    for token in kept:
        reached += probs[token]
        if reached > target:
            return token
    return kept[-1]
