"""Beam search: sequences of one request that advance together, sharing what they have in common by copy-on-write.

A round is over when every beam knows its likeliest next tokens. The best continuations of all beams become the next
beams; one that ends becomes a hypothesis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from anychip.kv_cache.manager import KVCacheManager
from anychip.messages import SequenceDelta, TokenLogprobs
from anychip.request import Request, RequestStatus
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
    """`beams[i]` is the output of `members[i]`, the request's sequence i. The members' own tokens and blocks follow
    the beams; whether they run is the scheduler's business."""

    def __init__(self, members: Sequence[Request]) -> None:
        first = members[0]
        self.members = members
        self.sampling = first.sampling
        self.width = first.sampling.beam_width
        self.max_output = first.max_output
        self.stop_ids = first.stop_ids
        self.beams = [Beam() for _ in range(self.width)]
        self.finished: list[Hypothesis] = []
        self.num_candidates = num_candidates(self.width, len(self.stop_ids))
        self._candidates: dict[int, TokenLogprobs] = {}

    def take(self, beam: int, likeliest: TokenLogprobs, kv: KVCacheManager) -> list[SequenceDelta]:
        """A beam's likeliest next tokens. The last of a round moves all beams on, with their blocks. Returns the
        best n once the search is over."""
        self._candidates[beam] = likeliest
        if len(self._candidates) < self.width:
            return []
        chosen = self.advance()
        if self.over:
            return [self._delta(rank, found) for rank, found in enumerate(self.results())]
        self._move(chosen, kv)
        return []

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

    def _move(self, chosen: list[Continuation], kv: KVCacheManager) -> None:
        """Gives every member the tokens of its new beam, and the blocks of the member that it continues."""
        members, running = self.members, RequestStatus.RUNNING
        before = [(member.num_computed, member.status) for member in members]
        prompt = members[0].token_ids[: members[0].num_prompt]
        kv.adopt(
            [
                (members[index], members[found.beam])
                for index, found in enumerate(chosen)
                if index != found.beam and members[index].status is running and members[found.beam].status is running
            ]
        )
        for index, (member, found) in enumerate(zip(members, chosen, strict=True)):
            member.token_ids = prompt + self.beams[index].token_ids
            if member.status is not running:
                member.block_hashes = []  # they were of the tokens that it had
                continue
            member.reenters = True
            member.num_computed, source = before[found.beam]
            if source is not running:  # its blocks are gone: this one computes them again
                member.block_hashes = []
                kv.free(member)
                kv.start(member)

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

    def _delta(self, rank: int, found: Hypothesis) -> SequenceDelta:
        first, sampling = self.members[0], self.sampling
        scored = sampling.prompt_logprobs is not None and rank == 0
        return SequenceDelta(
            first.request_id,
            rank,
            found.beam.token_ids,
            finish_reason=found.finish_reason,
            logprobs=found.beam.logprobs if sampling.logprobs is not None else None,
            prompt_logprobs=first.prompt_logprobs if scored else None,
            cached_tokens=first.cached_tokens,
            queued_s=first.scheduled_at - first.arrived_at,
        )


def _shortened(found: Continuation, before: float, count: int) -> TokenLogprobs:
    return TokenLogprobs(found.score - before, found.logprobs.top_ids[:count], found.logprobs.top[:count])
