"""With several stages, which requests a step may have: those that decode take turns, so that every stage has a step."""

from __future__ import annotations

from collections.abc import Sequence

from anychip.request import Request
from anychip.types import cdiv

_LEAST_CHUNK = 256
"""Tokens of prompts in a step: with fewer, a device reads its weights for longer than it multiplies."""
_CHUNKS_A_STAGE = 2
"""The first stage has nothing to do behind its last chunk, and the last stage nothing before its first one: with n
chunks over P stages they take n + P - 1 turns of a chunk each."""


class PipelineTurns:
    """A request's next token needs its last one, which the last stage draws. Until then the stages before it compute
    steps of other requests: as many steps are under way as there are stages, each with an equal share of those that
    decode. Chunks of a prompt need nothing that is drawn, and follow each other without a gap."""

    def __init__(self, num_stages: int, max_tokens: int, multiple: int) -> None:
        """`max_tokens` of a step; a chunk of a prompt has a multiple of so many."""
        self.num_stages = num_stages
        self._max_tokens, self._multiple = max_tokens, multiple
        self._chunk = 0
        """Since no prompt was left to compute: smaller chunks at the end would be more steps, and no fewer turns."""

    def tokens(self, running: Sequence[Request], waiting: int) -> int:
        """How many tokens a step computes at most: those of the requests that decode, and a part of the prompts',
        `waiting` of which are of requests that do not run. With all of them in one step, one stage would compute while
        the others wait."""
        left = waiting + sum(max(0, request.num_prompt - request.num_computed) for request in running)
        part = max(self._chunk, _LEAST_CHUNK, cdiv(left, _CHUNKS_A_STAGE * self.num_stages))
        self._chunk = part if left else 0
        return min(self._max_tokens, self.share(running) + cdiv(part, self._multiple) * self._multiple)

    def share(self, running: Sequence[Request]) -> int:
        """How many requests that decode a step takes at most."""
        return max(1, cdiv(sum(request.num_computed >= request.num_prompt for request in running), self.num_stages))

    def waits(self, request: Request, step_id: int) -> bool:
        """Whether the first stage would wait in step `step_id` for what an earlier one is still to draw for the
        request. What has come back is there already."""
        return request.num_promised > 0 and request.drawn_in > step_id - self.num_stages

    @staticmethod
    def ids_behind(rows: Sequence[Request], step_id: int) -> int:
        """StepDecision.ids_behind of a step with these rows."""
        newest = max(request.drawn_in for request in rows)
        return step_id - newest if newest else 0
