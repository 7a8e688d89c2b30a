"""Beam search: sequences of one request that advance together.

A round is over when every beam knows its likeliest next tokens. The best continuations of all beams become the next
beams; one that ends becomes a hypothesis. Knows no requests and no blocks: those follow the beams in beams.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from anychip.sampling_params import SamplingParams
from anychip.step_messages import TokenLogprobs
from anychip.types import FinishReason


def num_candidates(width: int, num_stop_ids: int) -> int:
    """How many likeliest tokens of each beam a round needs: even if all stop tokens are among them, enough go on."""
    return width + max(width, num_stop_ids)


class Continuation(NamedTuple):
    """A beam and the token that continues it."""

    score: float
    beam: int
    token: int
    logprobs: TokenLogprobs


@dataclass(slots=True)
class Beam:
    """`score` is the sum of the log-probabilities of `token_ids`."""

    score: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class Hypothesis:
    beam: Beam
    value: float
    finish_reason: FinishReason


class BeamSearch:
    """`beams[i]` is the output of the request's sequence i."""

    def __init__(self, sampling: SamplingParams, *, max_output: int, stop_ids: frozenset[int]) -> None:
        self.sampling = sampling
        self.width = sampling.beam_width
        self.max_output = max_output
        self.stop_ids = stop_ids
        self.beams = [Beam() for _ in range(self.width)]
        self.finished: list[Hypothesis] = []
        self._candidates: dict[int, TokenLogprobs] = {}

    def has_answered(self, beam: int) -> bool:
        """Whether a beam's likeliest next tokens are known in this round: it has nothing to compute until the next."""
        return beam in self._candidates

    def take(self, beam: int, likeliest: TokenLogprobs) -> bool:
        """A beam's likeliest next tokens. Returns whether they were the last of the round."""
        assert beam not in self._candidates, f"beam {beam} answered twice in a round"
        self._candidates[beam] = likeliest
        return len(self._candidates) == self.width

    def advance(self) -> list[Continuation]:
        """Ends the round: what each beam becomes, by beam."""
        chosen: list[Continuation] = []
        for rank, found in enumerate(self._best()):
            length = len(self.beams[found.beam].token_ids) + 1
            if found.token in self.stop_ids and length >= self.sampling.min_tokens:
                # As in Hugging Face's search, an end that is not among the best `width` is dropped.
                if rank < self.width:
                    self._finish(self._continued(found), "stop")
            elif found.token not in self.stop_ids:
                chosen.append(found)
            if len(chosen) == self.width:
                break
        chosen = self._kept_in_place(chosen)
        self.beams = [self._continued(found) for found in chosen]
        self._candidates.clear()
        return chosen

    def results(self) -> list[Hypothesis]:
        """The best n, best first, once the search is over."""
        if len(self.beams[0].token_ids) >= self.max_output:
            for beam in self.beams:
                self._finish(beam, "length")
        return self.finished[: self.sampling.n]

    def _best(self) -> list[Continuation]:
        first_round = not self.beams[0].token_ids
        beams = [0] if first_round else range(self.width)  # at first all beams are the same
        found = [
            Continuation(self.beams[beam].score + logprob, beam, token, likeliest)
            for beam in beams
            for likeliest in [self._candidates[beam]]
            for token, logprob in zip(likeliest.top_ids, likeliest.top, strict=True)
        ]
        return sorted(found, key=lambda one: -one.score)

    def _continued(self, found: Continuation) -> Beam:
        parent, kept = self.beams[found.beam], self.sampling.logprobs
        logprobs = [] if kept is None else [*parent.logprobs, _shortened(found, parent.score, kept)]
        return Beam(found.score, [*parent.token_ids, found.token], logprobs)

    def _kept_in_place(self, chosen: list[Continuation]) -> list[Continuation]:
        """In an order where a continuation of beam i stands at i, if there is one: its blocks need no new owner."""
        placed: dict[int, Continuation] = {}
        for found in chosen:
            placed.setdefault(found.beam, found)
        others = iter([found for found in chosen if placed[found.beam] is not found])
        return [placed[beam] if beam in placed else next(others) for beam in range(self.width)]

    def _finish(self, beam: Beam, reason: FinishReason) -> None:
        self.finished.append(Hypothesis(beam, self._value(beam), reason))
        self.finished.sort(key=lambda found: -found.value)
        del self.finished[self.width :]

    def _value(self, beam: Beam) -> float:
        return float(beam.score / len(beam.token_ids) ** self.sampling.length_penalty)

    @property
    def over(self) -> bool:
        """Whether no beam can become better than the hypotheses that are there, or all are as long as they may be."""
        if len(self.beams[0].token_ids) >= self.max_output:
            return True
        if len(self.finished) < self.width:
            return False
        return self.sampling.early_stopping or max(map(self._value, self.beams)) <= self.finished[-1].value


def _shortened(found: Continuation, before: float, count: int) -> TokenLogprobs:
    return TokenLogprobs(found.score - before, found.logprobs.top_ids[:count], found.logprobs.top[:count])
