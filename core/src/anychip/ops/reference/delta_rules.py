"""Recurrences that correct what a key reads before they write it: the gated delta rule, KDA and RWKV-7's wkv.

All are S = exp(g) S + a (b S) + k v^T with the S before the token, for vectors a and b of key_dim: a token reads the
state once, and writes twice. The chunked form solves for what every token of a chunk reads, a triangular system (Yang
et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anychip.ops.reference.state_rules import Given, States

_CHUNK = 64
_CHUNK_BY_CHANNEL = 16
"""Decays by channel have a number for every pair of tokens and channel."""
_EPS = 1e-6


class Terms(NamedTuple):
    """By row or token and head: [.., heads, key_dim], v [.., heads, value_dim], and g [.., heads, key_dim or 1]."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    a: Tensor
    b: Tensor


class DeltaRule:
    """A subclass says what its inputs make of the terms."""

    def terms(self, inputs: Given) -> Terms:
        raise NotImplementedError

    def step(self, inputs: Given, states: States, weights: Given) -> tuple[Tensor, States]:
        q, k, v, g, a, b = self.terms(inputs)
        state = states["state"]
        read = b.unsqueeze(-2) @ state  # [rows, heads, 1, value_dim]
        after = g.exp().unsqueeze(-1) * state + a.unsqueeze(-1) * read + k.unsqueeze(-1) * v.unsqueeze(-2)
        return (q.unsqueeze(-2) @ after).squeeze(-2), {"state": after}

    def chunk(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        terms, outputs, state = self.terms(inputs), [], first["state"]
        size = _CHUNK if terms.g.shape[-1] == 1 else _CHUNK_BY_CHANNEL
        for start in range(0, len(terms.q), size):
            found, state = _advance(Terms(*(each[start : start + size] for each in terms)), state)
            outputs.append(found)
        return torch.cat(outputs), {"state": state}


def _advance(terms: Terms, state: Tensor) -> tuple[Tensor, Tensor]:
    """A few tokens at once: outputs [tokens, heads, value_dim], and the state [heads, key_dim, value_dim] then."""
    q, k, v, g, a, b = (each.transpose(0, 1) for each in terms)  # [heads, tokens, ...]
    until = g.cumsum(dim=1)  # what has decayed when a token has been taken in
    before = until - g
    read = b * before.exp() @ state + _pairs(b, k, before, until, -1) @ v
    system = torch.eye(q.shape[1], device=q.device) - _pairs(b, a, before, until, -1)
    read = torch.linalg.solve_triangular(system, read, upper=False, unitriangular=True)
    found = q * until.exp() @ state + _pairs(q, a, until, until, 0) @ read + _pairs(q, k, until, until, 0) @ v
    left = (until[:, -1:] - until).exp()
    written = (left * a).transpose(1, 2) @ read + (left * k).transpose(1, 2) @ v
    return found.transpose(0, 1), until[:, -1].exp().unsqueeze(-1) * state + written


def _pairs(left: Tensor, right: Tensor, at: Tensor, since: Tensor, diagonal: int) -> Tensor:
    """[heads, tokens, tokens]: products of two tokens' vectors through the decay that lies between them, where the
    second is no later than the first less `diagonal`; else 0."""
    count = left.shape[1]
    hidden = torch.ones(count, count, dtype=torch.bool, device=left.device).triu(diagonal + 1)
    between = (at.unsqueeze(2) - since.unsqueeze(1)).masked_fill(hidden.unsqueeze(-1), -torch.inf).exp()
    if between.shape[-1] == 1:
        return (left @ right.transpose(1, 2)) * between.squeeze(-1)
    return torch.einsum("hik,hjk,hijk->hij", left, right, between)


class Kda(DeltaRule):
    def terms(self, inputs: Given) -> Terms:
        return self.delta_terms(inputs, inputs["q"], inputs["k"], inputs["g"])

    @staticmethod
    def delta_terms(inputs: Given, q: Tensor, k: Tensor, g: Tensor) -> Terms:
        q, k = (x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + _EPS) for x in (q, k))
        q, written = q * q.shape[-1] ** -0.5, inputs["beta"].unsqueeze(-1) * k
        return Terms(q, written, inputs["v"], g, -written, g.exp() * k)


class GatedDelta(Kda):
    def terms(self, inputs: Given) -> Terms:
        repeats = inputs["v"].shape[1] // inputs["q"].shape[1]
        q, k = (inputs[name].repeat_interleave(repeats, dim=1) for name in ("q", "k"))
        return self.delta_terms(inputs, q, k, inputs["g"].unsqueeze(-1))


class Wkv7(DeltaRule):
    def terms(self, inputs: Given) -> Terms:
        return Terms(*(inputs[name] for name in ("q", "k", "v", "g", "a", "b")))
