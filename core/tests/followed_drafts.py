"""Texts that are sampled while a head follows them, and what it drafted behind which of their tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from anychip import SamplingParams
from anychip.scheduler.proposing import Proposing
from anychip.speculation.speculator import Speculator
from anychip_conformance.equality import VOCAB_SIZE
from anychip_conformance.equality.workload import Case, open_llm

MAX_DRAFTS = 3


def texts() -> list[list[int]]:
    """Some share a beginning, and part within a block."""
    rng = random.Random(1)

    def some(count: int) -> list[int]:
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(count)]

    shared = some(60)
    return [some(1), some(2), shared[:21] + some(9), shared[:39] + some(4), shared[:39] + some(30), some(48)]


def watched_drafts(monkeypatch: pytest.MonkeyPatch, how_often: float) -> list[tuple[list[int], list[int]]]:
    """Fills with known tokens and the draft behind them, as engines run. In a share `how_often` of the steps drafts are
    asked for."""
    rng = random.Random(0)
    depth, take, drafted = Speculator.depth, Proposing.take, list[tuple[list[int], list[int]]]()

    def sometimes(self, requests, most, *, num_rows):
        return depth(self, requests, most, num_rows=num_rows) if rng.random() < how_often else 0

    def watched(self, step, result):
        take(self, step, result)
        ids = memoryview(result.proposed).cast("i").tolist()
        for request, epoch, count in step.proposing:
            mine, ids = ids[:count], ids[count:]
            if request.epoch == epoch:
                drafted.append((request.token_ids, mine))

    monkeypatch.setattr(Speculator, "depth", sometimes)
    monkeypatch.setattr(Proposing, "take", watched)
    return drafted


def followed(
    monkeypatch: pytest.MonkeyPatch, case: Case, target: Path, speculate: str, how_often: float, **settings: object
) -> list[tuple[list[int], list[int]]]:
    """Known tokens, and the draft behind them: of sampled texts, which leave the guesses often, in chunks, behind
    prefix hits, after preemption, beside others. With `how_often` 0.3 the head is asked in a third of the steps, and
    follows the others later."""
    drafted = watched_drafts(monkeypatch, how_often)
    sampling = SamplingParams(temperature=0.4, seed=1, n=2, max_tokens=18, ignore_eos=True)
    with open_llm(case, target, speculate=speculate, max_drafts=MAX_DRAFTS, **settings) as llm:
        scheduler = llm.engine.scheduler
        scheduler.drafting.measured_costs_are_ignored()
        for _ in range(2):
            llm.generate(texts(), sampling)
        llm.engine.drain()
        assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_usable
        assert scheduler.stats.prefix_hits > 0 or not case.prefix_caching or case.device == "fake-hostlen"
        assert (scheduler.num_preemptions > 0) >= case.preemption
    assert len(drafted) > 30
    return drafted
