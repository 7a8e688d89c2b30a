"""Recurrences whose every number decays by itself: gated sums, selective scans, SSD, lightning attention. And the
causal convolution, whose state is its last inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip.ops.reference.state_rules import Given, States

_CHUNK = 64
"""Tokens whose pairs are looked at together."""


def gated_sum_recurrent(x: Tensor, gate: Tensor, first: Tensor) -> Tensor:
    """The sums after each token [num_tokens, *shape], from the sum `first` [*shape] before them; all float32."""
    sums, last = [], first
    for added, kept in zip(x, gate, strict=True):
        last = kept * last + added
        sums.append(last)
    return torch.stack(sums)


def gated_sum_chunked(x: Tensor, gate: Tensor, first: Tensor) -> Tensor:
    """As gated_sum_recurrent, in as many rounds as the logarithm of the number of tokens: after a round that looks back
    `reach` tokens, each place holds what the last 2 * `reach` tokens make of any sum before them."""
    added, kept = x.clone(), gate.clone()
    added[0] += kept[0] * first
    reach = 1
    while reach < len(x):
        more, before = added[:-reach].clone(), kept[:-reach].clone()
        added[reach:] += kept[reach:] * more
        kept[reach:] = kept[reach:] * before
        reach *= 2
    return added


class GatedSum:
    def step(self, inputs: Given, states: States, weights: Given) -> tuple[Tensor, States]:
        sums = inputs["gate"] * states["sum"] + inputs["x"]
        return sums, {"sum": sums}

    def chunk(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        sums = gated_sum_chunked(inputs["x"], inputs["gate"], first["sum"])
        return sums, {"sum": sums[-1]}


class CausalConv:
    def step(self, inputs: Given, states: States, weights: Given) -> tuple[Tensor, States]:
        seen = torch.cat((states["tail"], inputs["x"].unsqueeze(1)), dim=1)  # [rows, width, channels]
        return self._biased((seen * weights["weight"].T).sum(dim=1), weights), {"tail": seen[:, 1:]}

    def chunk(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        weight, count = weights["weight"], len(inputs["x"])
        seen = torch.cat((first["tail"], inputs["x"]))  # [width - 1 + num_tokens, channels]
        result = torch.zeros_like(inputs["x"])
        for at in range(weight.shape[1]):
            result += seen[at : at + count] * weight[:, at]
        return self._biased(result, weights), {"tail": seen[count:]}

    @staticmethod
    def _biased(result: Tensor, weights: Given) -> Tensor:
        return result + weights["bias"] if "bias" in weights else result


class SelectiveScan:
    """Mamba-1."""

    def step(self, inputs: Given, states: States, weights: Given) -> tuple[Tensor, States]:
        decay, added = self._terms(inputs, weights)
        return self._read(after := decay * states["state"] + added, inputs, weights), {"state": after}

    def chunk(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        outputs, state = [], first["state"]
        for start in range(0, len(inputs["x"]), _CHUNK):  # a state for every token is large
            mine = {name: given[start : start + _CHUNK] for name, given in inputs.items()}
            decay, added = self._terms(mine, weights)
            after = gated_sum_chunked(added, decay, state)
            outputs.append(self._read(after, mine, weights))
            state = after[-1]
        return torch.cat(outputs), {"state": state}

    @staticmethod
    def _terms(inputs: Given, weights: Given) -> tuple[Tensor, Tensor]:
        """What multiplies the state, and what is added to it: [rows or tokens, channels, state_dim] both."""
        dt = inputs["dt"].unsqueeze(-1)
        return (dt * weights["a"]).exp(), dt * inputs["x"].unsqueeze(-1) * inputs["b"].unsqueeze(-2)

    @staticmethod
    def _read(states: Tensor, inputs: Given, weights: Given) -> Tensor:
        return (states * inputs["c"].unsqueeze(-2)).sum(dim=-1) + weights["d"] * inputs["x"]


class Ssd:
    """Mamba-2."""

    def step(self, inputs: Given, states: States, weights: Given) -> tuple[Tensor, States]:
        x, dt = inputs["x"], inputs["dt"]
        b, c = (_by_head(inputs[name], x.shape[1]) for name in ("b", "c"))
        decay = (dt * weights["a"]).exp()[..., None, None]
        after = decay * states["state"] + (dt.unsqueeze(-1) * x).unsqueeze(-1) * b.unsqueeze(-2)
        read = (after @ c.unsqueeze(-1)).squeeze(-1)  # [rows, heads, head_dim]
        return read + weights["d"].unsqueeze(-1) * x, {"state": after}

    def chunk(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        x, dt = inputs["x"], inputs["dt"]
        b, c = (_by_head(inputs[name], x.shape[1]) for name in ("b", "c"))
        outputs, state = [], first["state"]
        for start in range(0, len(x), _CHUNK):
            mine = slice(start, start + _CHUNK)
            found, state = decayed_products(
                queries=c[mine],
                keys=b[mine],
                values=dt[mine].unsqueeze(-1) * x[mine],
                decays=dt[mine] * weights["a"],
                state=state.transpose(1, 2),
            )
            state = state.transpose(1, 2)
            outputs.append(found)
        return torch.cat(outputs) + weights["d"].unsqueeze(-1) * x, {"state": state}


class Lightning:
    """MiniMax-01."""

    def step(self, inputs: Given, states: States, weights: Given) -> tuple[Tensor, States]:
        decay = (-weights["slope"]).exp()[:, None, None]
        after = decay * states["state"] + inputs["k"].unsqueeze(-1) * inputs["v"].unsqueeze(-2)
        return (inputs["q"].unsqueeze(-2) @ after).squeeze(-2), {"state": after}

    def chunk(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        outputs, state = [], first["state"]
        for start in range(0, len(inputs["q"]), _CHUNK):
            q, k, v = (inputs[name][start : start + _CHUNK] for name in ("q", "k", "v"))
            decays = (-weights["slope"]).expand(len(q), -1)
            found, state = decayed_products(queries=q, keys=k, values=v, decays=decays, state=state)
            outputs.append(found)
        return torch.cat(outputs), {"state": state}


def decayed_products(
    *, queries: Tensor, keys: Tensor, values: Tensor, decays: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Linear attention of a few tokens over each other and over `state` [heads, key_dim, value_dim], which has taken in
    all before them: S = exp(decay) S + k v^T, and the output is q S. queries and keys [tokens, heads, key_dim], values
    [tokens, heads, value_dim], decays [tokens, heads], 0 at most. Returns the outputs, and the state after them."""
    q, k, v = (each.transpose(0, 1) for each in (queries, keys, values))  # [heads, tokens, ...]
    until = decays.T.cumsum(dim=-1)  # [heads, tokens]: by how much each token has let decay what stood before the chunk
    between = (until.unsqueeze(-1) - until.unsqueeze(-2)).masked_fill(_later(len(queries), q), -torch.inf).exp()
    read = ((q @ k.transpose(1, 2)) * between) @ v + until.exp().unsqueeze(-1) * (q @ state)
    left = (until[:, -1:] - until).exp().unsqueeze(-1)
    after = until[:, -1].exp()[:, None, None] * state + (left * k).transpose(1, 2) @ v
    return read.transpose(0, 1), after


def _later(count: int, like: Tensor) -> Tensor:
    """[count, count] bool: keys behind their query."""
    return torch.ones(count, count, dtype=torch.bool, device=like.device).triu(1)


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    """[rows, groups, size] as each head sees it, [rows, heads, size]."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)
