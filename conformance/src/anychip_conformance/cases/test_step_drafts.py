"""Steps in which tokens are drafted: what is kept of them, and where their rows stand afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from anychip_conformance.case import Nothing, kind
from anychip_conformance.cases.test_steps import NEAR, TEXT, expected
from anychip_conformance.device import Device
from anychip_conformance.engines import checkpoint
from anychip_conformance.step_driver import RowEdits, StepDriver, rows_of, tokens_of

_DEADLINE_S = 180.0
_MAX_DRAFTS = 4
_NUM_TEXT = len(TEXT)


def drafted(device: Device, check: Callable[[StepDriver], None]) -> None:
    device.limit("its steps take no drafts", device.platform.step_rules.takes_drafts)
    driver = StepDriver(device, checkpoint(device, "llama").path, max_drafts=_MAX_DRAFTS)
    try:
        check(driver)
    finally:
        driver.close()


@kind("step.drafts", deadline_s=_DEADLINE_S)
def drafts(device: Device, case: Nothing) -> None:
    """Drafts are kept up to the first that is not drawn, also where a later one would be right. The row then goes on
    from there, in steps with drafts and without; rows beside it, and those that wait, are as they always are; each
    log-probability is that of its own token."""

    def check(driver: StepDriver) -> None:
        wanted, other = expected(device, 7), list(reversed(TEXT))
        results = [driver.step(new={5: (other, [3])}, tokens={5: _NUM_TEXT})]
        results += [driver.step(tokens={5: 1}) for _ in range(5)]
        alone, alone_logprobs = [tokens_of(result)[0] for result in results], [result.logprobs[0] for result in results]
        bad = next(token for token in range(3, 99) if token not in wanted)
        new = {0: (TEXT, [1]), 1: (other, [2])}
        first = rows_of(driver.step(new=new, tokens={0: _NUM_TEXT, 1: _NUM_TEXT}, finished=[5]))
        assert first == [wanted[:1], alone[:1]], f"got {first}, expected {[wanted[:1], alone[:1]]}"
        result = driver.step(tokens={1: 1, 0: 4}, drafts={0: [wanted[1], wanted[2], bad]})
        found = rows_of(result)
        assert found == [alone[1:2], wanted[1:4]], f"got {found}, expected {[alone[1:2], wanted[1:4]]}"
        likeliest = [result.logprobs[place].top_ids[0] for place in range(4)]
        assert likeliest == [alone[1], *wanted[1:4]], "log-probabilities of other samples"
        # The first draft misses, and the one behind it is right by itself.
        result = driver.step(
            tokens={0: 3, 1: 3}, drafts={0: [bad, wanted[5]], 1: alone[2:4]}, rewinds={0: _NUM_TEXT + 3}
        )
        found = rows_of(result)
        assert found == [wanted[4:5], alone[2:5]], f"got {found}, expected {[wanted[4:5], alone[2:5]]}"
        for place, without in enumerate(alone_logprobs[2:5], start=1):
            near = np.isclose(result.logprobs[place].chosen, without.chosen, rtol=0, atol=NEAR)
            near &= np.isclose(result.logprobs[place].top, without.top, rtol=0, atol=NEAR).all()
            assert near, f"token {place} of the step: {result.logprobs[place]}, without drafts {without}"
        found = rows_of(driver.step(tokens={0: 1}, rewinds={0: _NUM_TEXT + 4}))
        found += rows_of(driver.step(tokens={0: 2}, drafts={0: [bad]}))
        found += rows_of(driver.step(tokens={1: 1}))  # it waited while the other had drafts
        ends = [wanted[5:6], wanted[6:7], alone[5:6]]
        assert found == ends, f"got {found}, expected {ends}"

    drafted(device, check)


@kind("step.drafts_masks", deadline_s=_DEADLINE_S, quick=0)
def drafts_masks(device: Device, case: Nothing) -> None:
    """A mask holds for its own sample, the first, a middle and the last one of a row."""

    def check(driver: StepDriver) -> None:
        driver.step(new={0: (TEXT, [1]), 1: (TEXT, [2])}, tokens={0: _NUM_TEXT, 1: _NUM_TEXT})
        result = driver.step(
            tokens={0: 1, 1: 3}, drafts={1: [64, 65]}, masks={0: {3}, 1: {64}, 2: {65}, 3: {66}}
        )  # fmt: skip
        assert rows_of(result) == [[3], [64, 65, 66]], f"got {rows_of(result)}"

    drafted(device, check)


@kind("step.drafts_penalties", deadline_s=_DEADLINE_S, quick=0)
def drafts_penalties(device: Device, case: Nothing) -> None:
    """At a drafted position all tokens that its row drafted before it count as drawn, and no other row's. What is kept
    stays counted, and what is not kept never was, for no row: each draws what it draws without drafts, also one that
    has neither penalties nor drafts."""

    def check(driver: StepDriver) -> None:
        often, seldom, third, last = 3, 64, 65, 66
        row = RowEdits(frequency=400.0, biases={often: 1000.0, seldom: 450.0, third: 40.0, last: 20.0})
        wanted = [often, often, seldom, often, seldom, third, last]
        drafts_and_edits, edits_alone, plain = 1, 0, 2
        slots, found = (drafts_and_edits, edits_alone, plain), dict[int, list[int]]()

        def step(order: list[int], drafted: Sequence[int] = (), *, each: int = 1, **more: Any) -> None:
            """`each` token of every slot, and the drafts."""
            tokens = dict.fromkeys(order, each)
            if drafted:
                tokens[drafts_and_edits] += len(drafted)
                more["drafts"] = {drafts_and_edits: list(drafted)}
            for slot, gained in zip(order, rows_of(driver.step(tokens=tokens, **more)), strict=True):
                found[slot] = found.get(slot, []) + gained

        new = {slot: (TEXT, [slot + 1]) for slot in slots}
        step(list(slots), each=_NUM_TEXT, new=new, edits={drafts_and_edits: row, edits_alone: row})
        # The last samples draw `seldom` behind a draft that misses: were it counted, it would be missing later.
        step([drafts_and_edits, plain, edits_alone], [often, third, often])
        assert found[drafts_and_edits] == wanted[:3], f"a miss: got {found[drafts_and_edits]}, expected {wanted[:3]}"
        # The last sample has two drafts before it, and draws what is left by both.
        step([plain, drafts_and_edits, edits_alone], [often, seldom], rewinds={drafts_and_edits: _NUM_TEXT + 2})
        step([edits_alone, drafts_and_edits, plain])
        for _ in wanted[4:]:
            step([edits_alone])
        for slot in (drafts_and_edits, edits_alone):
            assert found[slot] == wanted, f"slot {slot}: got {found[slot]}, expected {wanted}"
        without = expected(device, 4)
        assert found[plain] == without, f"neither penalties nor drafts: got {found[plain]}, expected {without}"

    drafted(device, check)
