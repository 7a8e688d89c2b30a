"""Drafts for the running sequences of one engine: who gets how many, and what came of them.

Steps with drafts cannot overlap: where a sequence stands is known when the step is taken in. `pays` says when giving up
the overlap is worth it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from anychip.drafts import Drafted, Drafts, Speculation
from anychip.engine_stats import SpeculationStats
from anychip.request import Request
from anychip.speculation.asking import SURE, Asking
from anychip.speculation.draft_model import EVIDENCE
from anychip.speculation.guard import Guard
from anychip.speculation.lengths import Acceptance, StepCosts, choose_depth, choose_lengths, newer_rates
from anychip.speculation.proposer import Proposer

_FORGET_EVERY = 1024
"""Steps after which what was learned of acceptance counts half."""

_WORTH = 1.03
"""How many times faster a step with drafts must promise to be: what is chosen for its promise keeps less."""


class Speculator:
    """`costs` None: nobody has measured steps, and every draft is tried. `draft_costs` are those of a pass of the draft
    model, by rows; without one, `drafts_in_workers` is False. `clock` gives seconds."""

    def __init__(
        self,
        proposer: Proposer,
        *,
        max_drafts: int,
        vocab_size: int,
        costs: StepCosts | None,
        draft_costs: StepCosts | None = None,
        drafts_in_workers: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.max_drafts = max_drafts
        self.acceptance = Acceptance()
        self._proposer = proposer
        self._guard = Guard(clock)
        self._asking = Asking(self._guard, vocab_size=vocab_size, max_drafts=max_drafts)
        self.costs = costs
        self.drafts_in_workers = drafts_in_workers
        self._draft_costs = draft_costs
        self._clock = clock
        self._num_sequences = 0
        self._overhead_s = 0.0
        self._taken_in_at: float | None = None
        self._choices = 0
        self._drafted = 0
        self._drawn = np.zeros(max_drafts + 1, dtype=np.int64)  # by length: drafts of which so much was drawn
        self._saved_s = 0.0

    @property
    def stats(self) -> SpeculationStats:
        accepted_at = tuple(np.cumsum(self._drawn[::-1])[::-1][1:].tolist())  # whose fourth was drawn, its third was
        return SpeculationStats(self._drafted, accepted_at, self._saved_s, self._guard.num_failures)

    # -- sequences ----------------------------------------------------------------------------------------

    def begin(self, request: Request) -> None:
        """A sequence enters the engine. The beams of a search have no drafts: they leave their texts."""
        self._num_sequences += 1
        if not request.is_beam:
            self._guard.ask(request, self._begin, request)

    def _begin(self, request: Request) -> None:
        # The lengths tell where a tenant's name ends: no two pairs are written alike.
        tenant, salt = request.tenant, request.prefix_root.salt
        drafter = self._proposer.begin(f"{len(tenant)} {tenant} {salt}")
        if drafter is None:
            raise TypeError("begin returned None, expected a drafter")
        request.speculation = Speculation(drafter)

    def end(self, request: Request) -> None:
        self._num_sequences -= 1
        speculation, request.speculation = request.speculation, None
        if speculation is not None and speculation.drafter is not None:
            self._guard.ask(request, self._proposer.end, speculation.drafter)
            request.speculation = None

    # -- drafts -------------------------------------------------------------------------------------------

    def take_in(self, running: Sequence[Request]) -> None:
        """Tells the drafters of their sequences' new tokens, as far as there is time between two steps."""
        self._asking.take_in(running)

    def choose(
        self, requests: Sequence[Request], most: Sequence[int], *, num_rows: int, num_tokens: int
    ) -> tuple[Drafts, np.ndarray]:
        """Drafts for the requests, and how many tokens of each the step is to have: at most so many, often none. The
        step has `num_rows` sequences that draw a token, and `num_tokens` without drafts."""
        self._count_choice()
        drafts = self._asking.drafts(requests, self.max_drafts)
        lengths = np.minimum(drafts.counts, most)
        if self.costs is not None and len(drafts.token_ids):
            lengths, rate = choose_lengths(
                self._chances(requests, drafts, lengths),
                num_rows=num_rows,
                num_tokens=num_tokens,
                costs=self.costs,
                overhead_s=self._overhead_s,
            )
            if rate < _WORTH * num_rows / (self.costs(num_tokens) + self._overhead_s):
                lengths = np.zeros_like(lengths)
        self._note_overhead()
        return drafts, lengths

    def _count_choice(self) -> None:
        self._choices += 1
        if self._choices % _FORGET_EVERY == 0:
            self.acceptance.forget()
            self._overhead_s /= 2

    def _note_overhead(self) -> None:
        """The time between a step with drafts and the next one is the host's, which overlap would hide. One that is far
        longer than others moves what is expected by little."""
        began, self._taken_in_at = self._taken_in_at, None
        if began is None or self.costs is None:
            return
        took = min(self._clock() - began, 2 * self._overhead_s + self.costs(1))
        self._overhead_s += 0.1 * (took - self._overhead_s)

    def pays(self, requests: Sequence[Request], most: Sequence[int], *, num_rows: int) -> bool:
        """Whether the next step should wait for the one in flight, which draws one token for each of its `num_rows`
        rows, so that it can have drafts. The requests are those of the rows that may have some: at most so many
        tokens, of which the step in flight draws the first."""
        self._count_choice()
        drafts = self._asking.drafts(requests, self.max_drafts + 1)
        if not len(drafts.token_ids):
            return False
        lengths = np.minimum(drafts.counts, most)
        if not (lengths > 1).any():
            return False
        if self.costs is None:
            return True
        chances = self._chances(requests, drafts, lengths)[:, 1:]
        _, rate = choose_lengths(
            chances, num_rows=num_rows, num_tokens=num_rows, costs=self.costs, overhead_s=self._overhead_s
        )
        return rate > _WORTH * num_rows / self.costs(num_rows)

    def depth(self, requests: Sequence[Request], most: Sequence[int], *, num_rows: int) -> int:
        """How many tokens the draft model is to draft behind the requests, at most so many behind each, for the step
        after the one that is being made, which has `num_rows` rows."""
        longest = np.minimum(np.array(most), self.max_drafts)
        if self.costs is None or self._draft_costs is None:
            return self.max_drafts
        own = np.array([np.nan if each.speculation is None else each.speculation.rate for each in requests])
        chances = self.acceptance.chances(np.full(len(requests), EVIDENCE), longest, own)
        depth, rate = choose_depth(
            chances,
            longest,
            num_rows=num_rows,
            costs=self.costs,
            draft_costs=self._draft_costs,
            overhead_s=self._overhead_s,
        )
        if rate < _WORTH * num_rows / self.costs(num_rows):
            return 0
        self._saved_s -= sum(self._draft_costs(int((longest > place).sum())) for place in range(depth))
        return depth

    def _chances(self, requests: Sequence[Request], drafts: Drafts, lengths: np.ndarray) -> np.ndarray:
        """By request and token, as Acceptance has them."""
        own = np.array([np.nan if each.speculation is None else each.speculation.rate for each in requests])
        chances = self.acceptance.chances(drafts.evidence, lengths, own)
        chances[(drafts.evidence >= SURE)[:, None] & (chances > 0)] = 1.0
        return chances

    def judged(self, drafted: Drafted, num_drawn: np.ndarray) -> None:
        """Of each row's drafts in a step, the first `num_drawn` were drawn; [num_rows]."""
        self._drafted += len(drafted.token_ids)
        self._drawn += np.bincount(num_drawn, minlength=len(self._drawn))
        speculations, counts, evidence = drafted.speculations, drafted.counts, drafted.evidence
        if evidence.max() >= SURE:  # of what is forced nothing is learned
            guessed = np.flatnonzero(evidence < SURE)
            speculations = [speculations[at] for at in guessed.tolist()]
            counts, evidence, num_drawn = counts[guessed], evidence[guessed], num_drawn[guessed]
        self.acceptance.add(evidence, counts, num_drawn)
        rates = newer_rates(np.array([each.rate for each in speculations]), counts, num_drawn)
        for speculation, rate in zip(speculations, rates.tolist(), strict=True):
            speculation.rate = rate

    def taken_in(self, num_rows: int, num_tokens: int, num_gained: int) -> None:
        """A step with drafts is taken in: it had `num_tokens` and brought `num_gained`. Where no sequence is left, the
        engine waits for one, and its time till then is no cost of drafts."""
        self._taken_in_at = self._clock() if self._num_sequences else None
        if self.costs is not None:
            alone = self.costs(num_rows) + self._overhead_s
            self._saved_s += alone * num_gained / num_rows - self.costs(num_tokens) - self._overhead_s
