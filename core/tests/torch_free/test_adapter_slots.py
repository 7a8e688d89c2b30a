"""Who has which slot of the device, and for how long: adapters of requests, without a device."""

from __future__ import annotations

import msgspec
import pytest
from engine_kit import add_message, load_adapters, make_core, make_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.errors import UnknownModel
from anychip.messages import AdapterReport, DropAdapter, LoadAdapter
from anychip.scheduler.adapters import AdapterSlots
from anychip.step_messages import AdapterSlot

A, B, C, D = (letter * 32 for letter in (b"a", b"b", b"c", b"d"))


def message(name: str, adapter: bytes | None, *, max_output: int = 4):
    return msgspec.structs.replace(add_message(name, [5, 6, 7], max_output=max_output), adapter=adapter)


def take_turns(core, count: int = 2) -> None:
    """A step is launched in one turn, and taken in in the next."""
    for _ in range(count):
        core.step()


def core_with(num_slots: int, *adapters: bytes, **more):
    core = make_core(make_scheduler(max_adapters=num_slots, **more))
    load_adapters(core, *adapters)
    return core


def running(core) -> set[str]:
    return {request.request_id for request in core.scheduler.running}


def test_the_slot_that_nobody_used_for_longest_gets_the_next_adapter():
    slots = AdapterSlots(2)
    first, second = slots.take(A), slots.take(B)
    slots.release(A)
    slots.release(B)
    assert slots.take(A) == first  # used again: B is the older one now
    slots.release(A)
    assert slots.take(C) == second
    assert slots.take_filled() == [AdapterSlot(first, A), AdapterSlot(second, B), AdapterSlot(second, C)]
    assert slots.take_filled() == []


def test_a_slot_in_use_is_nobodys_to_take():
    slots = AdapterSlots(1)
    slots.take(A)
    assert slots.has_room(A) and not slots.has_room(B)
    slots.take(A)
    slots.release(A)
    assert not slots.has_room(B), "another request holds it still"
    slots.release(A)
    assert slots.has_room(B)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.lists(st.tuples(st.booleans(), st.sampled_from([A, B, C, D])), max_size=60))
def test_no_two_adapters_that_are_held_share_a_slot(num_slots, moves):
    slots, held, device = AdapterSlots(num_slots), [], {}
    for enters, adapter in moves:
        if enters and slots.has_room(adapter):
            slot = slots.take(adapter)
            device |= {filled.slot: filled.digest for filled in slots.take_filled()}
            assert device[slot] == adapter
            held.append((adapter, slot))
        elif not enters and held:
            slots.release(held.pop(0)[0])
        assert all(device[slot] == adapter for adapter, slot in held), "a slot in use was filled with another adapter"
        assert len({adapter for adapter, _ in held}) <= num_slots


def test_a_step_has_at_most_as_many_adapters_as_there_are_slots():
    core = core_with(2, A, B, C)
    for name, adapter in (("1", A), ("2", B), ("3", C), ("4", A), ("5", None)):
        core.add(message(name, adapter))
    core.step()
    assert running(core) == {"1", "2", "4", "5"}, "3 waits for a slot, and those behind it do not wait for it"
    while core.has_work:
        core.step()
        assert len({request.adapter for request in core.scheduler.running} - {None}) <= 2


def test_a_request_that_waits_too_long_for_a_slot_goes_before_those_that_come_later():
    core = core_with(1, A, B)
    now = [0.0]
    core.scheduler.adapters._clock = lambda: now[0]
    core.admission._clock = lambda: now[0]
    core.add(message("a0", A, max_output=6))
    core.step()
    core.add(message("b", B))
    core.add(message("a1", A))
    take_turns(core)
    assert running(core) == {"a0", "a1"}, "the adapter is there: a1 need not wait"
    now[0] = 3.0
    core.add(message("a2", A))
    core.add(message("plain", None))
    take_turns(core)
    assert running(core) == {"a0", "a1", "plain"}, "b has waited too long: a2 waits behind it, plain takes no slot"
    ends = []
    while core.has_work:
        ends += [delta.request_id for delta in core.step() if delta.finish_reason]
    assert ends.index("b") < ends.index("a2")


def test_an_adapter_leaves_when_the_last_request_that_has_it_has_ended():
    core = core_with(2, A)
    core.add(message("1", A))
    core.step()
    core.adapters.drop(DropAdapter(A))
    core.tend_adapters()
    with pytest.raises(UnknownModel, match="not loaded"):
        core.add(message("2", A))
    assert core.executor.adapters == {A}
    while core.has_work:
        core.step()
    assert core.executor.adapters == set() and core.adapters.is_settled
    core.adapters.load(LoadAdapter(A, "again"))
    core.tend_adapters()
    core.add(message("3", A))
    step = core.scheduler.schedule()
    assert step.decision.adapters, "its slot was given up, and is filled again"


def test_an_adapter_that_is_loaded_again_while_it_leaves_stays():
    core = core_with(1, A)
    core.add(message("1", A))
    core.step()
    core.adapters.drop(DropAdapter(A))
    load_adapters(core, A)
    while core.has_work:
        core.step()
    assert core.executor.adapters == {A}
    core.add(message("2", A))


def test_a_load_that_fails_leaves_nothing():
    core = core_with(1)
    core.adapters.load(LoadAdapter(A, "nowhere"))
    core.executor.reports = [AdapterReport(A, ("AdapterRefused", "no"))]
    assert core.tend_adapters()[0].error == ("AdapterRefused", "no")
    assert core.adapters.is_settled
    with pytest.raises(UnknownModel):
        core.add(message("1", A))


def test_preemption_gives_the_slot_back_and_a_step_that_failed_fills_it_again():
    core = core_with(1, A, B)
    core.add(message("1", A))
    core.add(message("2", B))
    step = core.scheduler.schedule()
    assert [each.digest for each in step.decision.adapters] == [A]
    core.scheduler.abandon(step)
    (request,) = core.scheduler.running
    core.scheduler.preempt(request)
    step = core.scheduler.schedule()
    assert [each.digest for each in step.decision.adapters][-1:] == [A], "nothing says that the slot holds it"
