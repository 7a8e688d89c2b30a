"""Beams over a made-up model: against a plain search, under preemption, and with every block given back."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

import pytest
from engine_kit import add_message, make_core, make_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.errors import InvalidRequest
from anychip.step_messages import StepResult, TokenLogprobs

STOP = 2
VOCAB = 12


def distribution(tokens: tuple[int, ...], seed: int) -> list[float]:
    """Log-probabilities that depend on every token before."""
    weights = [1 + (hash((seed, tokens, token)) % 1000) / 100 for token in range(VOCAB)]
    total = sum(weights)
    return [math.log(weight / total) for weight in weights]


@dataclass
class Found:
    tokens: tuple[int, ...]
    score: float


def plain_search(prompt: list[int], *, width: int, n: int, length: int, penalty: float, seed: int) -> list[list[int]]:
    """The reference: every beam's every continuation, sorted."""
    live, ended = [Found((), 0.0)], []

    def value(found: Found) -> float:
        return found.score / len(found.tokens) ** penalty

    while True:
        found = [
            Found((*beam.tokens, token), beam.score + logprob)
            for beam in live
            for token, logprob in enumerate(distribution((*prompt, *beam.tokens), seed))
        ]
        found.sort(key=lambda one: -one.score)
        live = []
        for rank, one in enumerate(found):
            if len(live) == width:
                break
            if one.tokens[-1] != STOP:
                live.append(one)
            elif rank < width:
                ended.append(one)
        if len(live[0].tokens) >= length:
            return [list(one.tokens) for one in sorted(ended + live, key=lambda one: -value(one))[:n]]
        ended = sorted(ended, key=lambda one: -value(one))[:width]
        if len(ended) == width and max(map(value, live)) <= value(ended[-1]):
            return [list(one.tokens) for one in ended[:n]]


def run(core, *, seed: int, preempt_at: set[int] = frozenset(), limit: int = 600) -> dict[tuple[str, int], list[int]]:
    """Steps of a scheduler whose model is `distribution`, of the tokens that the workers were told of."""
    scheduler, outputs, told = core.scheduler, {}, {}
    for number in range(limit):
        if not scheduler.has_work:
            return outputs
        if number in preempt_at and scheduler.running:
            scheduler.preempt(scheduler.running[-1])
        step = scheduler.schedule()
        assert step is not None, "requests are left and nothing is scheduled"
        told.update((row.slot, tuple(memoryview(row.token_ids).cast("i"))) for row in step.decision.new_rows)
        logprobs = {}
        for position, request in enumerate(step.sampling):
            values = distribution(told[request.slot], seed)
            order = sorted(range(VOCAB), key=lambda token: -values[token])[: request.num_logprobs]
            logprobs[position] = TokenLogprobs(values[order[0]], order, [values[token] for token in order])
        ids = array("i", [0] * len(step.sampling)).tobytes()
        for delta in scheduler.update(step, StepResult(step.decision.step_id, ids, logprobs)):
            outputs[delta.request_id, delta.index] = delta.token_ids
    raise AssertionError("the search did not end")


@settings(max_examples=120, deadline=None)
@given(
    width=st.integers(1, 4),
    length=st.integers(1, 7),
    penalty=st.sampled_from([1.0, 0.0, 2.0]),
    seed=st.integers(0, 10**6),
    preempt_at=st.sets(st.integers(0, 12), max_size=4),
    prompt=st.lists(st.integers(3, 11), min_size=1, max_size=9),
    prefix_caching=st.booleans(),
)
def test_beams_are_those_of_a_plain_search(width, length, penalty, seed, preempt_at, prompt, prefix_caching):
    core = make_core(make_scheduler(num_blocks=40, prefix_caching=prefix_caching))
    n = max(1, width - 1)
    core.add(add_message("a", prompt, max_output=length, beam_width=width, n=n, length_penalty=penalty))
    found = run(core, seed=seed, preempt_at=preempt_at)
    expected = plain_search(prompt, width=width, n=n, length=length, penalty=penalty, seed=seed)
    assert [found["a", rank] for rank in range(n)] == expected
    pool = core.scheduler.kv.pool
    assert pool.num_free == pool.num_usable


def test_two_searches_that_do_not_fit_at_once_both_end():
    core = make_core(make_scheduler(num_blocks=64, max_num_seqs=4))
    for name in ("a", "b", "c"):
        core.add(add_message(name, [3, 4, 5], max_output=5, beam_width=3, n=3))
    found = run(core, seed=1)
    assert {request_id for request_id, _ in found} == {"a", "b", "c"}
    assert found["a", 0] == found["b", 0] == found["c", 0]


def test_an_aborted_search_gives_everything_back():
    core = make_core(make_scheduler(num_blocks=40))
    core.add(add_message("a", list(range(3, 11)), max_output=6, beam_width=4, n=2))
    core.scheduler.schedule()
    ends = core.abort("a")
    assert [end.index for end in ends] == [0, 1]
    assert not core.scheduler.requests and not core.scheduler.waiting.num_tokens


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"beam_width": 9}, "9 beams; at most 8 sequences run"),
        ({"beam_width": 8, "max_output": 300}, "KV blocks, there are 63"),
    ],
)
def test_searches_that_could_never_run_are_refused(options, expected):
    core = make_core(make_scheduler())
    with pytest.raises(InvalidRequest, match=expected):
        core.add(add_message("a", [5] * 3, **options))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), width=st.integers(2, 4), seed=st.integers(0, 10**6), prefix_caching=st.booleans())
def test_results_do_not_depend_on_when_steps_return_and_who_is_preempted(data, width, seed, prefix_caching):
    core = make_core(make_scheduler(num_blocks=40, prefix_caching=prefix_caching))
    scheduler, prompt = core.scheduler, [3, 4, 5, 6]
    core.add(add_message("a", prompt, max_output=5, beam_width=width, n=width))
    in_flight, outputs = [], {}
    for _ in range(400):
        if not scheduler.has_work and not in_flight:
            break
        scheduler.max_tokens = data.draw(st.sampled_from([1, 2, 64]))
        action = data.draw(st.sampled_from(["step", "step", "return", "preempt"]))
        if action == "preempt" and scheduler.running and data.draw(st.booleans()):
            scheduler.preempt(data.draw(st.sampled_from(scheduler.running)))
        step = scheduler.schedule() if action != "return" and len(in_flight) < 3 else None
        if step is not None:
            known = [tuple(request.token_ids) for request in step.sampling]
            in_flight.append((step, known, step.sampling[0].num_logprobs if step.sampling else 0))
        elif in_flight:
            step, known, count = in_flight.pop(0)
            logprobs = {}
            for position, tokens in enumerate(known):
                values = distribution(tokens, seed)
                order = sorted(range(VOCAB), key=lambda token: -values[token])[:count]
                logprobs[position] = TokenLogprobs(values[order[0]], order, [values[token] for token in order])
            ids = array("i", [0] * len(known)).tobytes()
            for delta in scheduler.update(step, StepResult(step.decision.step_id, ids, logprobs)):
                outputs[delta.index] = delta.token_ids
        scheduler.kv.check_integrity(scheduler.running)
    expected = plain_search(prompt, width=width, n=width, length=5, penalty=1.0, seed=seed)
    assert [outputs[rank] for rank in range(width)] == expected
