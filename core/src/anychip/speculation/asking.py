"""Asks the drafters of all running sequences, in one pass for a step, and checks in bulk what they answer.

A pass does little for each sequence: it calls its drafter, and looks at the clock. Whose draft is none is looked for
where the check of all finds one.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import islice
from operator import index

import numpy as np

from anychip.drafts import NO_DRAFT, Draft, Drafts
from anychip.request import Request
from anychip.speculation.guard import MISTAKES, Guard, goes_on_without

_TAKEN_IN = 1024
"""Tokens of prompts that drafters take in between two steps: a long one is not indexed at once, for others wait."""

SURE = 64
"""Evidence of a token that a grammar forces. A proposer's counts as less, whatever it says."""


class Asking:
    """Around the drafters of one engine. What they raise reaches nobody."""

    def __init__(self, guard: Guard, *, vocab_size: int, max_drafts: int) -> None:
        self._guard = guard
        self._few = 2 * (1 + max_drafts)  # a sequence gains no more between two passes, and all of that is taken in
        self._vocab_size = vocab_size

    def take_in(self, running: Sequence[Request]) -> None:
        """Tells the drafters of their sequences' new tokens, as far as there is time between two steps."""
        guard, clock, limit = self._guard, self._guard.clock, self._guard.limit_s
        room, few, at = _TAKEN_IN, self._few, 0
        while at < len(running) and not guard.gave_up:
            before = clock()
            try:
                for request in islice(running, at, None):
                    at += 1
                    speculation = request.speculation
                    if speculation is None or (drafter := speculation.drafter) is None:
                        continue
                    output = request.output_token_ids
                    new = request.num_prompt + len(output) - speculation.num_told
                    if new > 0:
                        drafter.extend(output[-new:] if new <= len(output) else request.token_ids[-new:])
                        speculation.num_told += new
                        speculation.behind += new
                    asked = speculation.behind
                    if asked > few:
                        asked = min(asked, room)
                        room -= asked
                    if asked > 0:
                        taken = drafter.catch_up(asked)
                        if type(taken) is not int or taken != asked:
                            taken = _checked(taken, asked)
                        speculation.behind -= taken
                    now = clock()
                    if now - before > limit:
                        guard.failed(request, None, now - before)
                        break
                    before = now
            except MISTAKES as raised:
                guard.failed(running[at - 1], raised, clock() - before)
        if guard.gave_up:
            for request in running:
                if request.speculation is not None and request.speculation.drafter is not None:
                    goes_on_without(request)

    def drafts(self, requests: Sequence[Request], most: int) -> Drafts:
        """What may follow the sequences' last known tokens, at most `most` tokens each."""
        forced = {at: ids for at, each in enumerate(requests) if each.processors and (ids := _forced(each, most))}
        ids, counts, evidence = self._answers(requests, most, forced)
        if not ids:  # most steps of a chat
            none = np.zeros(len(counts), dtype=np.int32)
            return Drafts(none[:0], none, none)
        try:
            token_ids = np.frombuffer(array("i", ids), dtype=np.int32)
            numbers = np.frombuffer(array("i", evidence), dtype=np.int32)
            is_sound = bool(token_ids.min() >= 0 and token_ids.max() < self._vocab_size)
        except MISTAKES:
            is_sound = False
        if not is_sound:
            token_ids, counts, numbers = self._sound_ones(requests, ids, counts, evidence)
        numbers = np.minimum(np.maximum(numbers, 0), SURE - 1)
        if forced:
            numbers[list(forced)] = SURE
        return Drafts(token_ids, np.array(counts, dtype=np.int32), numbers)

    def _answers(
        self, requests: Sequence[Request], most: int, forced: Mapping[int, list[int]]
    ) -> tuple[list[int], list[int], list[int]]:
        """Token ids, one sequence's after the other's, and their counts and evidence by sequence. Nobody knows yet
        whether they are such. `forced`, by place among the requests, is nobody's guess."""
        guard, clock, limit = self._guard, self._guard.clock, self._guard.limit_s
        ids: list[int] = []
        counts: list[int] = []
        evidence: list[int] = []
        while len(counts) < len(requests):
            before, is_asked = clock(), not guard.gave_up
            try:
                for request in islice(requests, len(counts), None):
                    draft, speculation = NO_DRAFT, request.speculation
                    if forced and len(counts) in forced:
                        draft = Draft(forced[len(counts)], SURE)
                    elif is_asked and speculation is not None and not speculation.behind:
                        draft = NO_DRAFT if speculation.drafter is None else speculation.drafter.draft(most)
                        if not isinstance(draft, Draft):
                            raise TypeError(f"it returned {type(draft).__name__}, expected Draft")
                        now = clock()
                        if now - before > limit:
                            guard.failed(request, None, now - before)
                            draft, is_asked = NO_DRAFT, not guard.gave_up
                        before = now
                    token_ids, rests_on = draft.token_ids, draft.evidence
                    if type(token_ids) is not list or len(token_ids) > most:
                        token_ids = list(islice(token_ids, most))  # it may have no end
                    ids += token_ids
                    evidence.append(rests_on)
                    counts.append(len(token_ids))
            except MISTAKES as raised:
                guard.failed(requests[len(counts)], raised, clock() - before)
                evidence.append(0)
                counts.append(0)
        return ids, counts, evidence

    def _sound_ones(
        self, requests: Sequence[Request], ids: Sequence[int], counts: Sequence[int], evidence: Sequence[int]
    ) -> tuple[np.ndarray, list[int], np.ndarray]:
        """Of what `_answers` gives, the drafts that are such, one by one."""
        sound_ids, sound_counts, numbers, end = array("i"), [0] * len(counts), [0] * len(counts), 0
        for at, (request, count) in enumerate(zip(requests, counts, strict=True)):
            first, end = end, end + count
            try:
                mine = [self._token(token) for token in ids[first:end]]
                numbers[at] = max(0, min(index(evidence[at]), SURE))
            except MISTAKES as raised:
                self._guard.failed(request, raised, 0.0)
                continue
            sound_ids.extend(mine)
            sound_counts[at] = count
        return np.frombuffer(sound_ids, dtype=np.int32), sound_counts, np.array(numbers, dtype=np.int32)

    def _token(self, guess: int) -> int:
        token = index(guess)
        if not 0 <= token < self._vocab_size:
            raise ValueError(f"it drafted token {token}, expected 0 to {self._vocab_size - 1}")
        return token


def _checked(taken: int, asked: int) -> int:
    if not 0 <= index(taken) <= asked:
        raise ValueError(f"catch_up({asked}) returned {taken}, expected 0 to {asked}")
    return index(taken)


def _forced(request: Request, most: int) -> list[int]:
    """Tokens that a restriction leaves no choice about."""
    for processor in request.processors:
        if forced := processor.forced(request)[:most]:
            return forced
    return []
