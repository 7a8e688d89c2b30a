"""Requests that end with a vector, and requests that bring embeddings, as the scheduler sees them."""

from __future__ import annotations

import pytest
from engine_kit import make_request, make_scheduler

from anychip.engine.extras import ServedExtras, check_extras
from anychip.errors import InvalidRequest
from anychip.messages import AddRequest
from anychip.prefix import MediaSpan
from anychip.prompt_extras import Pooling, PromptExtras
from anychip.request import RequestStatus
from anychip.sampling_params import SamplingParams
from anychip.scheduler.scheduler import Scheduler
from anychip.step_messages import StepResult

PROMPT = list(range(10, 20))
VECTOR = b"\0" * 8


def pooled(name: str, kind: str, prompt: list[int] = PROMPT, **more: object):
    return make_request(name, prompt, max_output=1, extras=PromptExtras(pooling=Pooling(kind)), **more)  # type: ignore[arg-type]


def take_in(scheduler: Scheduler, step) -> list:
    result = StepResult(step.decision.step_id, b"", {}, vectors=dict.fromkeys(step.pooled, VECTOR))
    return scheduler.update(step, result)


def test_a_vector_ends_its_request_when_the_prompt_is_computed() -> None:
    scheduler = make_scheduler(budget=4)
    request = pooled("a", "mean")
    scheduler.add(request)
    ends = []
    for tokens in (4, 4, 2):
        step = scheduler.schedule()
        assert step is not None and sum(memoryview(step.decision.num_tokens).cast("i")) == tokens
        assert not step.sampling and bool(step.pooled) == (tokens == 2)
        ends += take_in(scheduler, step)
    (delta,) = ends
    assert delta.vector == VECTOR and delta.finish_reason == "stop" and delta.token_ids == []
    assert request.status is RequestStatus.FINISHED and not scheduler.has_work
    assert scheduler.schedule() is None
    scheduler.kv.check_integrity([])


def test_nothing_is_scheduled_behind_the_prompt_while_the_vector_is_on_its_way() -> None:
    scheduler = make_scheduler()
    scheduler.add(pooled("a", "last"))
    step = scheduler.schedule()
    assert step is not None and scheduler.schedule() is None and scheduler.has_work
    assert take_in(scheduler, step)[0].vector == VECTOR


def test_a_preempted_vector_is_computed_anew() -> None:
    scheduler = make_scheduler()
    request = pooled("a", "mean")
    scheduler.add(request)
    first = scheduler.schedule()
    scheduler.preempt(request)
    assert first is not None and take_in(scheduler, first) == []
    again = scheduler.schedule()
    assert again is not None and [row.num_computed for row in again.decision.new_rows] == [0]
    assert take_in(scheduler, again)[0].vector == VECTOR


@pytest.mark.parametrize(("kind", "computed"), [("last", 8), ("mean", 0), ("cls", 0)])
def test_only_the_last_tokens_vector_takes_a_prefix_hit(kind: str, computed: int) -> None:
    scheduler = make_scheduler()
    for name in ("a", "b"):
        scheduler.add(pooled(name, kind))
        step = scheduler.schedule()
        assert step is not None
        (row,) = step.decision.new_rows
        take_in(scheduler, step)
    assert row.num_computed == computed


def test_one_that_waits_for_rows_of_the_buffer_enters_when_another_ends() -> None:
    scheduler = make_scheduler()
    scheduler.waiting.free_embeddings = 5
    extras = PromptExtras(embedded=((2, 3),))
    for name in ("a", "b"):
        scheduler.add(make_request(name, PROMPT, max_output=1, extras=extras, arrival=ord(name)))
    step = scheduler.schedule()
    assert step is not None and len(step.decision.new_rows) == 1 and scheduler.waiting.free_embeddings == 2
    assert step.decision.new_rows[0].extras == extras
    assert scheduler.schedule() is None
    scheduler.update(step, StepResult(step.decision.step_id, b"\2\0\0\0", {}))
    step = scheduler.schedule()
    assert step is not None and len(step.decision.new_rows) == 1 and scheduler.waiting.free_embeddings == 2


SPAN = MediaSpan(1, 2, bytes(32))
SERVED = ServedExtras(pooling=True, max_embeddings=2, hidden_size=4, max_position=8)


@pytest.mark.parametrize(
    ("extras", "served", "said"),
    [
        (PromptExtras(pooling=Pooling()), ServedExtras(), "--pooling"),
        (PromptExtras(pooling=Pooling("best")), SERVED, "known are last, mean, cls"),  # type: ignore[arg-type]
        (PromptExtras(embedded=((0, 3),), embeddings=bytes(48)), SERVED, "3 tokens bring embeddings at once"),
        (PromptExtras(embedded=((1, 2),), embeddings=bytes(31)), SERVED, "32 bytes, and 31 came"),
        (PromptExtras(embedded=((1, 2),), embeddings=b"\0\0\xc0\x7f" * 8), SERVED, "not finite"),
        (PromptExtras(embedded=((0, 2),), embeddings=bytes(32)), SERVED, "media span"),
        (PromptExtras(positions=bytes(36)), ServedExtras(), "have no axes"),
        (PromptExtras(positions=bytes(35)), SERVED, "36 bytes, and 35 came"),
        (PromptExtras(positions=bytes(48)), SERVED, "36 bytes, and 48 came"),
        (PromptExtras(positions=b"\7\0\0\0" * 9), SERVED, "8 positions"),
        (PromptExtras(positions=b"\1\0\0\0" * 9), SERVED, "its place"),
    ],
)
def test_what_cannot_be_served_is_refused(extras: PromptExtras, served: ServedExtras, said: str) -> None:
    message = AddRequest("a", bytes(12), SamplingParams(), 3, (), media=(SPAN,), extras=extras)
    with pytest.raises(InvalidRequest, match=said):
        check_extras(message, extras, served)


def test_beams_need_rows_for_each_of_them() -> None:
    extras = PromptExtras(embedded=((1, 2),), embeddings=bytes(32))
    message = AddRequest("a", bytes(12), SamplingParams(beam_width=2), 1, (), media=(SPAN,), extras=extras)
    with pytest.raises(InvalidRequest, match="4 tokens bring embeddings at once"):
        check_extras(message, extras, SERVED)


@pytest.mark.parametrize("asked", [{"n": 2}, {"prompt_logprobs": 1}, {"beam_width": 2}])
def test_a_vector_comes_without_text(asked: dict[str, int]) -> None:
    extras = PromptExtras(pooling=Pooling())
    message = AddRequest("a", bytes(12), SamplingParams(**asked), 1, (), extras=extras)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="draws no text"):
        check_extras(message, extras, SERVED)
