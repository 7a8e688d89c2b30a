"""With several stages, which requests a step may have: those that decode take turns, so that every stage has a step."""

from __future__ import annotations

from collections.abc import Sequence

from anychip.request import Request
from anychip.types import cdiv


class PipelineTurns:
    """A request's next token needs its last one, which the last stage draws. Until then the stages before it compute
    steps of other requests: as many steps are under way as there are stages, each with an equal share of those that
    decode. Chunks of a prompt need nothing that is drawn, and follow each other without a gap."""

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages

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
