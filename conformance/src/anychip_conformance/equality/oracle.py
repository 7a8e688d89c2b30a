"""What transformers answers, with the distance between its two best logits at every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

UNIT_ROUNDOFF = 2.0**-24


@dataclass(frozen=True, slots=True)
class Answer:
    """Greedy tokens; `margins[i]` is the best logit less the second best where tokens[i] was chosen; `bounds[i]`
    is how far two float32 evaluations of those logits may lie apart."""

    tokens: list[int]
    margins: list[float]
    bounds: list[float]


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> Answer:
    """Without a cache, one whole forward pass a token: nothing of the oracle is shared with what it judges."""
    config = model.config
    # Each of depth x width sums rounds once; errors of both evaluations count.
    growth = 2 * config.num_hidden_layers * config.hidden_size * UNIT_ROUNDOFF
    ids, answer = list(prompt), Answer([], [], [])
    for _ in range(num_tokens):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        best = logits.topk(2)
        answer.tokens.append(int(best.indices[0]))
        answer.margins.append(float(best.values[0] - best.values[1]))
        answer.bounds.append(growth * float(logits.abs().max()))
        ids.append(answer.tokens[-1])
    return answer


@dataclass(frozen=True, slots=True)
class Verdict:
    """`divergence` is the index of the first different token, None where there is none."""

    divergence: int | None
    excused: bool


def judge(answer: Answer, tokens: Sequence[int]) -> Verdict:
    """Only a first divergence can be excused, and only where the two best logits were closer than the bound."""
    for index, (expected, actual) in enumerate(zip(answer.tokens, tokens, strict=True)):
        if expected != actual:
            return Verdict(index, answer.margins[index] < answer.bounds[index])
    return Verdict(None, False)
