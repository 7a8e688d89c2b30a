"""The searches that run, and the requests that follow them: whose tokens and blocks a beam continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anychip.kv_cache.manager import KVCacheManager
from anychip.messages import SequenceDelta
from anychip.request import Request, RequestStatus
from anychip.scheduler.beam_search import BeamSearch, Continuation, Hypothesis
from anychip.step_messages import TokenLogprobs
from anychip.types import RequestId


@dataclass(slots=True, frozen=True)
class _Search:
    members: tuple[Request, ...]
    """Sequence i follows beam i."""
    search: BeamSearch


class Beams:
    """Whether the members run is the scheduler's business; it asks `waits`."""

    def __init__(self, kv: KVCacheManager) -> None:
        self._kv = kv
        self._searches: dict[RequestId, _Search] = {}

    def begin(self, members: Sequence[Request]) -> None:
        """The sequences of one request, by index."""
        first = members[0]
        search = BeamSearch(first.sampling, max_output=first.max_output, stop_ids=first.stop_ids)
        self._searches[first.request_id] = _Search(tuple(members), search)

    def end(self, request_id: RequestId) -> None:
        self._searches.pop(request_id, None)

    def waits(self, member: Request) -> bool:
        """Whether a member has nothing to compute: its answer of this round is known, or in flight."""
        return member.num_promised > 0 or self._searches[member.request_id].search.has_answered(member.index)

    def take(self, member: Request, likeliest: TokenLogprobs) -> list[SequenceDelta]:
        """A member's likeliest next tokens. The last of a round moves all beams on, with their blocks. Returns the
        best n once the search is over."""
        running = self._searches[member.request_id]
        search = running.search
        if not search.take(member.index, likeliest):
            return []
        chosen = search.advance()
        if search.over:
            return [_delta(running.members[0], rank, found) for rank, found in enumerate(search.results())]
        self._move(running, chosen)
        return []

    def _move(self, running: _Search, chosen: Sequence[Continuation]) -> None:
        """Gives every member the tokens of its new beam, and the blocks of the member that it continues. All have
        answered, so that no step in flight computes for any of them."""
        members = running.members
        computed = [member.num_computed for member in members]
        held = [member.status is RequestStatus.RUNNING for member in members]
        self._kv.adopt(
            [
                (members[index], members[found.beam])
                for index, found in enumerate(chosen)
                if index != found.beam and held[index] and held[found.beam]
            ]
        )
        for member, beam, found in zip(members, running.search.beams, chosen, strict=True):
            member.output_token_ids = list(beam.token_ids)
            member.enters = held[member.index]
            if held[member.index] and held[found.beam]:
                member.num_computed = computed[found.beam]
            else:  # there are no blocks to take over: this one computes them again
                self._kv.replace_tokens(member)


def _delta(first: Request, rank: int, found: Hypothesis) -> SequenceDelta:
    sampling = first.sampling
    return SequenceDelta(
        first.request_id,
        rank,
        found.beam.token_ids,
        finish_reason=found.finish_reason,
        logprobs=found.beam.logprobs if sampling.logprobs is not None else None,
        prompt_logprobs=first.prompt_logprobs if sampling.prompt_logprobs is not None and rank == 0 else None,
        cached_tokens=first.cached_tokens,
        queued_s=first.scheduled_at - first.arrived_at,
    )
