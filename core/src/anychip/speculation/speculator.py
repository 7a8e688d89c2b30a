"""Drafts for the running sequences of one engine: who gets how many, and what came of them.

Steps with drafts cannot overlap: where a sequence stands is known when the step is taken in. `pays` says when giving up
the overlap is worth it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice
from operator import index

from anychip.drafts import NO_DRAFT, Draft, Drafter, Speculation
from anychip.messages import SpeculationStats
from anychip.request import Request
from anychip.speculation.guard import Guard
from anychip.speculation.lengths import Acceptance, StepCosts, choose_lengths, newer_rate
from anychip.speculation.proposer import Proposer

_TAKEN_IN = 1024
"""Tokens that drafters take in between two steps: a long prompt is not indexed at once, for others wait meanwhile."""

_FORGET_EVERY = 1024
"""Steps after which what was learned of acceptance counts half."""

_SURE = 64
"""Evidence of a token that a grammar forces. A proposer's counts as less, whatever it says."""


class Speculator:
    """`costs` None: nobody has measured steps, and every draft is tried. `clock` gives seconds."""

    def __init__(
        self,
        proposer: Proposer,
        *,
        max_drafts: int,
        vocab_size: int,
        costs: StepCosts | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.max_drafts = max_drafts
        self.acceptance = Acceptance()
        self._proposer = proposer
        self._guard = Guard(clock)
        self._vocab_size = vocab_size
        self.costs = costs
        self._clock = clock
        self._overhead_s = 0.0
        self._taken_in_at: float | None = None
        self._choices = 0
        self._drafted = 0
        self._accepted_at = [0] * max_drafts
        self._saved_s = 0.0

    @property
    def stats(self) -> SpeculationStats:
        return SpeculationStats(self._drafted, tuple(self._accepted_at), self._saved_s, self._guard.num_failures)

    # -- sequences ----------------------------------------------------------------------------------------

    def begin(self, request: Request) -> None:
        """A sequence enters the engine. The beams of a search have no drafts: they leave their texts."""
        if request.is_beam:
            return
        self._guard.ask(request, self._begin, request)

    def _begin(self, request: Request) -> None:
        request.speculation = Speculation(self._proposer.begin(request.tenant))

    def end(self, request: Request) -> None:
        speculation, request.speculation = request.speculation, None
        if speculation is not None:
            self._guard.ask(request, self._proposer.end, speculation.drafter)

    # -- drafts -------------------------------------------------------------------------------------------

    def take_in(self, running: Sequence[Request]) -> None:
        """Tells the drafters of their sequences' new tokens, as far as there is time between two steps."""
        room = _TAKEN_IN
        for request in running:
            speculation = request.speculation
            if speculation is None:
                continue
            if speculation.behind or speculation.num_told < request.num_known:
                room -= self._guard.ask(request, self._catch_up, request, speculation, room) or 0

    def _catch_up(self, request: Request, speculation: Speculation, most: int) -> int:
        """How many of its sequence's tokens a drafter took in, of at most `most`."""
        if speculation.num_told < request.num_known:
            self._tell(request, speculation)
        asked = min(most, speculation.behind)
        if asked <= 0:
            return 0
        taken = index(speculation.drafter.catch_up(asked))
        if not 0 <= taken <= asked:
            raise ValueError(f"catch_up({asked}) returned {taken}, expected 0 to {asked}")
        speculation.behind -= taken
        return taken

    @staticmethod
    def _tell(request: Request, speculation: Speculation) -> None:
        told = speculation.num_told
        new: Sequence[int] = request.output_token_ids[max(0, told - request.num_prompt) :]
        if told < request.num_prompt:
            new = [*memoryview(request.prompt).cast("i")[told:], *new]
        speculation.drafter.extend(new)
        speculation.num_told = request.num_known
        speculation.behind += len(new)

    def draft(self, request: Request, most: int) -> Draft:
        """What may follow the sequence's last known token."""
        speculation = request.speculation
        if speculation is None or speculation.behind or most <= 0:
            return NO_DRAFT
        at, draft = speculation.ahead
        if at != request.num_known:
            draft = self._forced(request) or self._guard.ask(request, self._guessed, speculation.drafter) or NO_DRAFT
            speculation.ahead = (request.num_known, draft)
        return Draft(draft.token_ids[:most], draft.evidence)

    def _guessed(self, drafter: Drafter) -> Draft:
        draft = drafter.draft(self.max_drafts)
        ids = [index(token) for token in islice(draft.token_ids, self.max_drafts)]
        for token in ids:
            if not 0 <= token < self._vocab_size:
                raise ValueError(f"it drafted token {token}, expected 0 to {self._vocab_size - 1}")
        return Draft(ids, min(index(draft.evidence), _SURE - 1))

    def _forced(self, request: Request) -> Draft | None:
        """Tokens that a restriction leaves no choice about."""
        for processor in request.processors:
            forced = processor.forced(request)[: self.max_drafts]
            if forced:
                return Draft(forced, _SURE)
        return None

    def choose(self, rows: Sequence[tuple[Request, int]], *, num_rows: int, num_tokens: int) -> list[Draft]:
        """A draft, often none, for each of the rows, given with the most tokens that it may have. The step has
        `num_rows` sequences that draw a token, and `num_tokens` without drafts."""
        self._choices += 1
        if self._choices % _FORGET_EVERY == 0:
            self.acceptance.forget()
        drafts = [self.draft(request, most) for request, most in rows]
        if self.costs is not None and any(draft.token_ids for draft in drafts):
            lengths, _ = choose_lengths(
                [self._chances(request, draft) for (request, _), draft in zip(rows, drafts, strict=True)],
                num_rows=num_rows,
                num_tokens=num_tokens,
                costs=self.costs,
                overhead_s=self._overhead_s,
            )
            drafts = [Draft(draft.token_ids[:n], draft.evidence) for draft, n in zip(drafts, lengths, strict=True)]
        self._note_overhead()
        return drafts

    def _note_overhead(self) -> None:
        """The time between a step with drafts and the next one is the host's, which overlap would hide. An engine that
        had nothing to do in between says nothing of it."""
        began, self._taken_in_at = self._taken_in_at, None
        if began is None or self.costs is None:
            return
        took = self._clock() - began
        if took < self.costs(1):
            self._overhead_s += 0.1 * (took - self._overhead_s)

    def pays(self, rows: Sequence[tuple[Request, int]]) -> bool:
        """Whether the next step should wait for the one in flight, which draws one token for each of the rows, so that
        it can have drafts. Judged by what the sequences held before that token."""
        drafts = [self.draft(request, most) for request, most in rows]
        if not any(len(draft.token_ids) > 1 for draft in drafts):
            return False
        if self.costs is None:
            return True
        chances = [self._chances(request, draft)[1:] for (request, _), draft in zip(rows, drafts, strict=True)]
        count = len(rows)
        _, rate = choose_lengths(
            chances, num_rows=count, num_tokens=count, costs=self.costs, overhead_s=self._overhead_s
        )
        return rate > count / self.costs(count)

    def _chances(self, request: Request, draft: Draft) -> list[float]:
        if draft.evidence >= _SURE:
            return [1.0] * len(draft.token_ids)
        own = None if request.speculation is None else request.speculation.rate
        return self.acceptance.chances(draft.evidence, len(draft.token_ids), own)

    def launched(self, request: Request, draft: Draft) -> None:
        """The sequence's next step has this draft."""
        if request.speculation is not None:
            request.speculation.evidence = draft.evidence

    def judged(self, request: Request, num_drafts: int, num_drawn: int) -> None:
        """Of a sequence's drafts, the first `num_drawn` were drawn."""
        self._drafted += num_drafts
        for at in range(num_drawn):
            self._accepted_at[at] += 1
        speculation = request.speculation
        if speculation is not None and speculation.evidence < _SURE:
            self.acceptance.add(speculation.evidence, num_drafts, num_drawn)
            speculation.rate = newer_rate(speculation.rate, num_drafts, num_drawn)

    def taken_in(self, num_rows: int, num_tokens: int, num_gained: int) -> None:
        """A step with drafts is taken in: it had `num_tokens` and brought `num_gained`."""
        self._taken_in_at = self._clock()
        if self.costs is not None:
            alone = self.costs(num_rows) + self._overhead_s
            self._saved_s += alone * num_gained / num_rows - self.costs(num_tokens) - self._overhead_s
