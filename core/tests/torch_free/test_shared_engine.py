"""LLM's calls on an engine in their own process: interleaved, nested, left half way and from several threads, each
gives what it gives alone."""

from __future__ import annotations

import threading
from collections import Counter

import msgspec
import pytest
from engine_kit import make_core, make_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.engine.input_processor import InputProcessor, RequestOptions
from anychip.engine.output_processor import OutputProcessor
from anychip.engine.shared_engine import SharedEngine
from anychip.errors import EngineDead, InvalidRequest, OutputFailed, RequestAborted
from anychip.sampling_params import SamplingParams

INPUTS = InputProcessor(tokenizer=None, vocab_size=1000, max_model_len=4096, eos_token_ids=(2,))


def request(prompt: list[int], max_tokens: int):
    return INPUTS.process("", prompt, SamplingParams(max_tokens=max_tokens))


class Shared:
    """An engine whose every token tells its request's prompt and its own position. `plan` is called in each step."""

    def __init__(self, max_in_flight: int = 1) -> None:
        scheduler = make_scheduler(num_blocks=400)
        schedule, drawn = scheduler.schedule, Counter()
        self.tokens: dict[tuple[int, int], int] = {}
        self.plan = lambda: None

        def watched():
            self.plan()
            step = schedule()
            for row, running in enumerate(step.sampling if step else ()):
                drawn[running.request_id] += 1
                token = 3 + (sum(running.token_ids[: running.num_prompt]) * 31 + drawn[running.request_id]) % 900
                self.tokens[step.decision.step_id, row] = token
            return step

        scheduler.schedule = watched
        self.core = make_core(scheduler, max_in_flight=max_in_flight, token_of=lambda step, row: self.tokens[step, row])
        self.outputs = OutputProcessor(None)
        self.engine = SharedEngine(self.core, self.outputs)

    def left(self) -> tuple[object, ...]:
        pool = self.core.scheduler.kv.pool
        return (
            self.engine._mailboxes, self.engine._inbox, self.outputs._requests, self.core.scheduler.requests,
            pool.num_usable - pool.num_free,
        )  # fmt: skip


def taken(run) -> dict[int, list[int]]:
    """Tokens by request of a run that is read to its end."""
    tokens: dict[int, list[int]] = {}
    for number, output in run:
        tokens.setdefault(number, []).extend(output.outputs[0].token_ids)
    return tokens


def alone(requests) -> dict[int, list[int]]:
    return taken(Shared().engine.run(requests))


JOBS = st.lists(
    st.lists(st.tuples(st.integers(3, 900), st.integers(1, 6)), min_size=1, max_size=3), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(jobs=JOBS, moves=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=40), depth=st.integers(1, 2))
def test_any_interleaving_gives_each_run_what_it_gives_alone(jobs, moves, depth):
    """A move reads one output of a run; 0 drops the run half way; 1 runs a call of its own in between."""
    shared = Shared(depth)
    asked = [[request([prompt, prompt + 1, 5], tokens) for prompt, tokens in job] for job in jobs]
    runs = {number: shared.engine.run(requests) for number, requests in enumerate(asked)}
    got: dict[int, dict[int, list[int]]] = {number: {} for number in runs}
    for number, move in moves:
        if number not in runs:
            continue
        if move == 0:
            runs.pop(number).close()
        elif move == 1:
            inner = [request([900, number + 3], 3)]
            assert taken(shared.engine.run(inner)) == alone(inner)
        else:
            for at, output in runs[number]:
                got[number].setdefault(at, []).extend(output.outputs[0].token_ids)
                break
    for number, run in runs.items():
        for at, tokens in taken(run).items():
            got[number].setdefault(at, []).extend(tokens)
        assert got[number] == alone(asked[number])
    shared.core.drain()
    assert shared.left() == ({}, [], {}, {}, 0)


@pytest.mark.parametrize("needed", [{}, {"logprobs": 2}, {"beam_width": 2}])
def test_what_is_read_at_its_end_comes_whole_unless_its_tokens_are_needed_on_the_way(needed):
    asked = INPUTS.process("", [5, 6], SamplingParams(max_tokens=9, **needed), RequestOptions(whole=True))
    assert asked.whole is not bool(needed)


def test_a_run_of_whole_requests_yields_each_once():
    whole = [request([prompt, 5], tokens) for prompt, tokens in ((7, 4), (9, 6))]
    run = Shared(2).engine.run([msgspec.structs.replace(one, whole=True) for one in whole])
    outputs = list(run)
    assert {number: output.outputs[0].token_ids for number, output in outputs} == alone(whole)
    assert len(outputs) == 2 and all(output.finished for _, output in outputs)


def test_threads_get_what_each_gets_alone():
    shared, got, barrier = Shared(2), {}, threading.Barrier(6)
    asked = {n: [request([10 * n + 3, 7], 8), request([10 * n + 5], 3)] for n in range(6)}

    def call(number: int) -> None:
        barrier.wait()
        got[number] = [taken(shared.engine.run(asked[number])) for _ in range(5)]

    threads = [threading.Thread(target=call, args=(number,)) for number in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == {number: [alone(requests)] * 5 for number, requests in asked.items()}
    assert shared.left() == ({}, [], {}, {}, 0)


def test_a_request_that_is_refused_ends_its_run_and_no_other():
    shared = Shared()
    open_run = shared.engine.run([request([5], 4)])
    next(open_run)
    beams = INPUTS.process("", [5], SamplingParams(max_tokens=4, beam_width=10))
    with pytest.raises(InvalidRequest, match="10 beams"):
        taken(shared.engine.run([request([6], 4), beams]))
    assert len(taken(open_run)[0]) == 3
    assert shared.left() == ({}, [], {}, {}, 0)


def test_an_output_that_cannot_be_made_ends_its_run_and_no_other():
    shared = Shared()
    process = shared.outputs.process
    shared.outputs.process = lambda delta: 1 / 0 if delta.request_id == "1" else process(delta)
    good, bad = shared.engine.run([request([5], 4)]), shared.engine.run([request([6], 4)])
    next(good)
    with pytest.raises(OutputFailed, match="ZeroDivisionError"):
        next(bad)
    assert len(taken(good)[0]) == 3
    assert shared.left() == ({}, [], {}, {}, 0)


def test_an_engine_that_fails_ends_every_run_with_the_cause():
    shared = Shared()
    runs = [shared.engine.run([request([5], 4)]), shared.engine.run([request([6], 4)])]
    for run in runs:
        next(run)
    cause = EngineDead("planted")

    def fail():
        raise cause

    shared.plan = fail
    for run in runs:
        with pytest.raises(EngineDead, match="planted"):
            taken(run)
    assert shared.engine._mailboxes == {}


def test_an_interrupted_step_leaves_the_engine_to_others():
    shared = Shared()
    other = shared.engine.run([request([5], 4)])
    next(other)

    def interrupt():
        shared.plan = lambda: None
        raise KeyboardInterrupt

    shared.plan = interrupt
    with pytest.raises(KeyboardInterrupt):
        taken(shared.engine.run([request([6], 4)]))
    assert len(taken(other)[0]) == 3


def test_a_run_whose_request_the_engine_has_lost_ends():
    shared = Shared()
    run = shared.engine.run([request([5], 4)])
    next(run)
    shared.core.abort("0")
    with pytest.raises(RequestAborted):
        taken(run)


def test_a_closed_engine_ends_what_is_open_and_refuses_what_comes():
    shared = Shared()
    run, late = shared.engine.run([request([5], 4)]), shared.engine.run([request([6], 4)])
    next(run)
    shared.engine.close("closed by its owner")
    for ended in (run, late):
        with pytest.raises(EngineDead, match="closed"):
            taken(ended)
    assert shared.engine._mailboxes == {}


def test_a_run_that_is_dropped_within_another_ones_step_is_aborted():
    shared = Shared()
    dropped = [shared.engine.run([request([6], 50)])]
    next(dropped[0])
    shared.plan = dropped.clear  # as the garbage collector would, at any moment
    assert len(taken(shared.engine.run([request([5], 4)]))[0]) == 4
    shared.core.drain()
    assert shared.left() == ({}, [], {}, {}, 0)
