"""Keeps the requests that wait for a slot, in order, and picks those that enter a step. The scheduler gives slots."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import NamedTuple

from anychip.kv_cache.manager import KVCacheManager
from anychip.request import Request, RequestStatus
from anychip.scheduler.adapters import AdapterSlots
from anychip.scheduler.beams import Beams
from anychip.scheduler.policy import Key, SchedulingPolicy
from anychip.scheduler.step import StepDraft


class _Blocked(NamedTuple):
    """A request for which the pool was short. Looking at it again is of no use before a block returns to the pool, or
    `missing` is on offer: a long prefix takes long to look up, and steps are many."""

    request: Request
    num_returned: int
    missing: bytes | None


class WaitingQueue:
    """`requests` is sorted by policy key; `num_tokens` counts the tokens of their prompts. `free_embeddings` counts the
    rows of the workers' buffer of embeddings that no request with a slot has."""

    def __init__(
        self,
        kv: KVCacheManager,
        policy: SchedulingPolicy,
        beams: Beams,
        adapters: AdapterSlots,
        max_embeddings: int = 0,
    ) -> None:
        self.free_embeddings = max_embeddings
        self._adapters = adapters
        self.requests: list[Request] = []
        self.num_tokens = 0
        self._kv = kv
        self._key = policy.key
        self._beams = beams
        self._blocked: _Blocked | None = None

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, request: Request) -> None:
        insort(self.requests, request, key=self._key)
        self.num_tokens += request.num_prompt

    def remove(self, request: Request) -> None:
        remove(self.requests, request, self._key)
        self.num_tokens -= request.num_prompt

    def admit(self, draft: StepDraft, num_slots: int, enter: Callable[[Request, int], None]) -> None:
        """Requests enter the step in order, at most `num_slots`, as far as it has room and the pool blocks.
        `enter(request, shared)` gives one that has its blocks a slot; so many of its tokens are in shared blocks."""
        room, kv = draft.room, self._kv
        shares = kv.shares or kv.checkpoints is not None
        admitted: set[Request] = set()
        starved = False  # whether a request has waited too long for its adapter's slot
        coming = self._coming(draft)
        for request in self.requests:
            if len(admitted) == num_slots or room.is_full:
                break
            if (shares and _waits_for_parent(request)) or (request.is_beam and self._beams.waits(request)):
                continue
            if request.adapter is not None and (starved or not self._adapters.has_room(request.adapter)):
                starved = starved or self._adapters.is_starved(request)
                continue
            if any(kv.shareable(request, at) in hashes for at, hashes in coming.items()):
                continue  # this very step computes what the request would compute again: a step later it is shared
            if self._is_blocked(request) or request.num_embedded > self.free_embeddings:
                break
            shared = kv.find_shared(request)
            behind = request.num_known - shared.num_tokens
            granted = room.grant(behind)
            if behind == 1 and room.rows == "more tokens":
                continue
            if granted <= 0:
                break
            if granted > 1 and kv.checkpoints is not None:
                granted = room.ending(granted, kv.checkpoints.stop(request, shared.num_tokens))
            if not kv.enter(request, shared, granted):
                self._blocked = _Blocked(request, kv.num_returned, kv.missing(request, shared.num_tokens))
                break
            enter(request, shared.num_tokens)
            self._note_coming(coming, request, granted)
            draft.place(request, granted, prefill=behind > 1)
            admitted.add(request)
        if admitted:
            self.requests = [request for request in self.requests if request not in admitted]
            self.num_tokens -= sum(request.num_prompt for request in admitted)

    def _is_blocked(self, request: Request) -> bool:
        """Whether the pool was short for a request, and nothing has changed that could help."""
        if self._blocked is None or self._blocked.request is not request:
            return False
        missing, kv = self._blocked.missing, self._kv
        return self._blocked.num_returned == kv.num_returned and (missing is None or kv.pool.find(missing) is None)

    def _coming(self, draft: StepDraft) -> dict[int, set[bytes]]:
        """By index, the hash of the first block that each prefill of the step makes full: who would compute that block
        as well shares all before it."""
        coming: dict[int, set[bytes]] = {}
        for request, count in zip(draft.rows, draft.counts, strict=True):
            self._note_coming(coming, request, count)
        return coming

    def _note_coming(self, coming: dict[int, set[bytes]], request: Request, count: int) -> None:
        found = self._kv.next_full(request, count) if count > 1 else None
        if found is not None:
            coming.setdefault(found[0], set()).add(found[1])


def _waits_for_parent(request: Request) -> bool:
    """A fork waits while its parent's prompt is about to be computed, then shares it."""
    parent = request.fork_of
    if parent is None or request.status is RequestStatus.PREEMPTED:
        return False
    if parent.status is RequestStatus.WAITING:
        return True
    if parent.status is not RequestStatus.RUNNING:
        request.fork_of = None
        return False
    return parent.num_computed < parent.num_prompt


def remove(ordered: list[Request], request: Request, key: Callable[[Request], Key]) -> None:
    """Removes a request from a list in order of its key."""
    position = bisect_left(ordered, key(request), key=key)
    while ordered[position] is not request:  # equal keys stand together
        position += 1
    del ordered[position]
