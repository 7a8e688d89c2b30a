"""The engine's loop over a fake executor: order of calls, overlap, several sequences, masks, refusals."""

from __future__ import annotations

from concurrent.futures import Future

import msgspec
import numpy as np
import pytest
from engine_kit import TOKEN, VOCAB_SIZE, add_message, make_core, make_scheduler

from anychip.engine.grammars import PendingGrammars
from anychip.errors import DeviceFault, UserError
from anychip.sampling_params import StructuredOutput


def run(core, *, limit: int = 500):
    deltas = []
    for _ in range(limit):
        if not core.has_work:
            return deltas
        deltas += core.step()
    raise AssertionError("the engine did not come to an end")


def test_in_order_every_step_is_collected_before_the_next_is_launched():
    core = make_core(make_scheduler(), max_in_flight=1)
    core.add(add_message("a", [5, 6], max_output=2))
    run(core)
    assert core.executor.calls == ["launch 1", "sample 1", "collect 1", "launch 2", "sample 2", "collect 2"]


def test_with_overlap_a_step_is_launched_before_the_one_before_is_collected():
    core = make_core(make_scheduler(), max_in_flight=2)
    core.add(add_message("a", [5, 6], max_output=3))
    run(core)
    assert core.executor.calls == [
        "launch 1", "sample 1", "launch 2", "collect 1", "sample 2", "launch 3", "collect 2", "sample 3", "collect 3",
    ]  # fmt: skip


def test_penalties_do_not_hold_back_the_overlap():
    orders = []
    for edits in ({}, {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {5: 1.0}}):
        core = make_core(make_scheduler(), max_in_flight=2)
        core.add(add_message("a", [5, 6], max_output=4, **edits))
        run(core)
        orders.append(core.executor.calls)
    assert orders[0] == orders[1]


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_every_request_gets_its_tokens_at_any_depth(max_in_flight):
    core = make_core(make_scheduler(num_blocks=20, max_num_seqs=3), max_in_flight=max_in_flight)
    for index in range(6):
        core.add(add_message(str(index), list(range(3, 6 + index)), max_output=5))
    tokens: dict[str, list[int]] = {}
    for delta in run(core):
        tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    assert tokens == {str(index): [TOKEN] * 5 for index in range(6)}


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_whole_request_is_told_of_once_with_all_that_its_pieces_tell(max_in_flight):
    """Blocks are short, so that some are preempted on the way; token 2 ends some of them early."""

    def told(*, whole):
        scheduler = make_scheduler(num_blocks=20, max_num_seqs=5)
        core = make_core(scheduler, max_in_flight=max_in_flight, token_of=lambda step, row: 2 + (7 * step + row) % 40)
        for index in range(6):
            message = add_message(str(index), list(range(3, 9 + index)), max_output=12, n=2, prompt_logprobs=0)
            core.add(msgspec.structs.replace(message, whole=whole))
        deltas = run(core)
        assert scheduler.num_preemptions
        found = {}
        for delta in deltas:
            found.setdefault((delta.request_id, delta.index), []).append(delta)
        return found

    pieces, wholes = told(whole=False), told(whole=True)
    assert wholes.keys() == pieces.keys()
    for name, (only,) in wholes.items():
        assert only.token_ids == [token for piece in pieces[name] for token in piece.token_ids]
        assert only.finish_reason == pieces[name][-1].finish_reason
        first = pieces[name][0]
        assert (only.cached_tokens, only.prompt_logprobs) == (first.cached_tokens, first.prompt_logprobs)
        assert only.queued_s is not None
    assert {only.finish_reason for (only,) in wholes.values()} == {"stop", "length"}


def test_an_aborted_whole_request_tells_what_it_has():
    core = make_core(make_scheduler())
    core.add(msgspec.structs.replace(add_message("a", [5, 6], max_output=6), whole=True))
    (request,) = core.scheduler.sequences("a")
    while request.num_output < 3:
        assert core.step() == []
    (end,) = core.abort("a")
    assert (end.token_ids, end.finish_reason) == ([TOKEN] * 3, "abort")


def test_n_sequences_share_the_seed_and_differ_by_index():
    core = make_core(make_scheduler())
    core.add(add_message("a", list(range(5, 15)), n=4))
    requests = [core.scheduler.requests["a"][index] for index in range(4)]
    assert len({request.seed for request in requests}) == 1
    assert [request.index for request in requests] == [0, 1, 2, 3]
    ends = [delta for delta in run(core) if delta.finish_reason]
    assert sorted(delta.index for delta in ends) == [0, 1, 2, 3]


def test_requests_without_a_seed_get_reproducible_ones():
    seeds = []
    for _ in range(2):
        core = make_core(make_scheduler(), seed=3)
        core.add(add_message("a", [5]))
        core.add(add_message("b", [5]))
        seeds.append([core.scheduler.requests[name][0].seed for name in "ab"])
    assert seeds[0] == seeds[1]
    assert seeds[0][0] != seeds[0][1]


def test_min_tokens_masks_the_stop_ids_until_enough_tokens_are_there():
    core = make_core(make_scheduler(), max_in_flight=2)
    core.add(add_message("a", [5, 6], max_output=4, min_tokens=2))
    run(core)
    masked = [late.masks for late in core.executor.late]
    assert [bool(masks) for masks in masked] == [True, True, False, False]
    words = np.frombuffer(masked[0][0], dtype=np.uint32)
    allowed = [(int(words[token // 32]) >> (token % 32)) & 1 for token in range(VOCAB_SIZE)]
    assert [token for token, bit in enumerate(allowed) if not bit] == [2]


@pytest.mark.parametrize("steps_before", range(6))
def test_an_abort_in_any_state_ends_the_request_and_frees_its_blocks(steps_before):
    core = make_core(make_scheduler(budget=4), max_in_flight=2)
    core.add(add_message("a", list(range(5, 15)), n=2, max_output=6))
    for _ in range(steps_before):
        core.step()
    ends = core.abort("a")
    assert [end.finish_reason for end in ends] == ["abort"] * len(ends)
    core.drain()
    assert not core.has_work
    assert core.scheduler.kv.pool.num_free == core.scheduler.kv.pool.num_usable


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (add_message("b", []), "the prompt is empty"),
        (add_message("b", [5, VOCAB_SIZE]), f"token id {VOCAB_SIZE}; the vocabulary has {VOCAB_SIZE}"),
        (add_message("b", [-1]), "token id -1"),
        (add_message("a", [5]), "is in use"),
        (add_message("b", [5], n=64), "requests wait, at most 64"),
    ],
)
def test_a_refused_request_leaves_nothing_behind(message, expected):
    core = make_core(make_scheduler())
    core.add(add_message("a", [5]))
    with pytest.raises(UserError, match=expected):
        core.add(message)
    assert list(core.scheduler.requests) == ["a"]


def failing(core, call, at, *, fatal=False):
    """The executor's `call` raises once, at its `at`th time."""
    real, times = getattr(core.executor, call), []

    def once(argument):
        times.append(argument)
        if len(times) == at:
            if call == "sample":
                core.executor._pending.pop()  # a result that will not come
            raise DeviceFault("asked 2 GiB, 1 GiB free", kind="out_of_memory", fatal=fatal)
        real(argument)

    setattr(core.executor, call, once)


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
@pytest.mark.parametrize("call", ["launch", "sample"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_step_that_fails_ends_its_requests_and_no_others(call, at, max_in_flight):
    core = make_core(make_scheduler(max_num_seqs=2), max_in_flight=max_in_flight)
    failing(core, call, at)
    names = [str(index) for index in range(6)]
    for name in names:
        core.add(add_message(name, [3, 4, 5, 6, 7, 8], max_output=5))
    deltas = run(core)
    failed = {delta.request_id for delta in deltas if delta.error is not None}
    assert 1 <= len(failed) <= 2
    assert all(d.error == ("StepFailed", "asked 2 GiB, 1 GiB free") for d in deltas if d.error is not None)
    for name in set(names) - failed:
        assert [token for d in deltas if d.request_id == name for token in d.token_ids] == [TOKEN] * 5
    pool = core.scheduler.kv.pool
    assert pool.num_free == pool.num_usable and pool.num_deferred == 0 and not core.scheduler.requests


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
@pytest.mark.parametrize("failed_steps", [{1}, {2}, {4}, {2, 3}, {3, 4, 5}])
def test_a_step_that_fails_on_its_way_back_ends_its_requests_once_and_the_engine_goes_on(failed_steps, max_in_flight):
    core = make_core(make_scheduler(max_num_seqs=2), max_in_flight=max_in_flight)
    real, done = core.executor.collect, []

    def collect():
        result = real()
        done.append(result.step_id)
        if len(done) in failed_steps:
            raise DeviceFault("asked 2 GiB, 1 GiB free", kind="out_of_memory", fatal=False)
        return result

    core.executor.collect = collect
    names = [str(index) for index in range(8)]
    for name in names:
        core.add(add_message(name, [3, 4, 5, 6, 7, 8], max_output=5))
    deltas = run(core)
    errors = [delta.request_id for delta in deltas if delta.error is not None]
    assert 1 <= len(errors) < len(names) and len(set(errors)) == len(errors)
    for name in set(names) - set(errors):
        assert [token for d in deltas if d.request_id == name for token in d.token_ids] == [TOKEN] * 5
    pool = core.scheduler.kv.pool
    assert pool.num_free == pool.num_usable and pool.num_deferred == 0 and not core.scheduler.requests
    assert done == sorted(done)


def test_what_a_failed_step_was_to_fill_is_not_offered():
    core = make_core(make_scheduler())
    failing(core, "launch", 1)
    prompt = list(range(3, 20))
    core.add(add_message("a", prompt))
    assert [delta.error[0] for delta in run(core)] == ["StepFailed"]
    core.add(add_message("b", prompt))
    first = run(core)[0]
    assert first.request_id == "b" and first.cached_tokens == 0


def test_a_fatal_fault_ends_the_engine():
    core = make_core(make_scheduler())
    failing(core, "launch", 2, fatal=True)
    core.add(add_message("a", [5, 6], max_output=4))
    with pytest.raises(DeviceFault, match="asked 2 GiB"):
        run(core)


def test_a_sequence_that_a_stop_string_ends_is_complete_for_the_policy():
    scheduler, ended = make_scheduler(), []
    scheduler.policy.ended = lambda request: ended.append((request.request_id, request.finish_reason))
    core = make_core(scheduler)
    for name in ("stopped", "left"):
        core.add(add_message(name, [5, 6], max_output=9))
    core.step()
    core.abort("stopped", 0, "stop")
    core.abort("left")
    assert ended == [("stopped", "stop"), ("left", "abort")]


def test_a_deadline_counts_from_arrival_while_a_grammar_is_compiled():
    class Never:
        def submit(self, wanted, *, count, after):
            return Future()

    now = [100.0]
    core = make_core(make_scheduler())
    core.admission.grammars, core.admission._clock = PendingGrammars(Never()), lambda: now[0]
    message = add_message("a", [5], structured=StructuredOutput("json_object"))
    core.add(msgspec.structs.replace(message, deadline=2.0))
    assert core.step() == []
    now[0] += 2.5
    (end,) = core.step()
    assert end.error[0] == "RequestTimeout"
    assert not core.has_work


def test_a_request_that_waited_for_its_grammar_keeps_its_arrival():
    compiled = Future()

    class Compiler:
        def submit(self, wanted, *, count, after):
            return compiled

    now = [100.0]
    core = make_core(make_scheduler())
    core.admission.grammars, core.admission._clock = PendingGrammars(Compiler()), lambda: now[0]
    message = add_message("a", [5], structured=StructuredOutput("json_object"))
    core.add(msgspec.structs.replace(message, deadline=2.0))
    compiled.set_result([])
    now[0] += 1.5
    core.admission.enter_compiled(wait=False)
    (request,) = core.scheduler.sequences("a")
    assert (request.arrived_at, request.deadline) == (100.0, 102.0)
