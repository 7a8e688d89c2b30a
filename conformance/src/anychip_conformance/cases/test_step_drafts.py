"""Steps in which tokens are drafted: what is kept of them, and where their rows stand afterwards."""

from __future__ import annotations

from collections.abc import Callable

from anychip_conformance.case import Nothing, kind
from anychip_conformance.cases.test_steps import TEXT, expected
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
    from there, in steps with drafts and without; rows beside it are as they always are; each log-probability is that of
    its own token."""

    def check(driver: StepDriver) -> None:
        wanted, other = expected(device, 7), list(reversed(TEXT))
        alone = tokens_of(driver.step(new={5: (other, [3])}, tokens={5: _NUM_TEXT}))
        alone += [tokens_of(driver.step(tokens={5: 1}))[0] for _ in range(4)]
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
        found = rows_of(driver.step(tokens={0: 1}, rewinds={0: _NUM_TEXT + 4}))
        found += rows_of(driver.step(tokens={0: 2}, drafts={0: [bad]}))
        assert found == [wanted[5:6], wanted[6:7]], f"got {found}, expected {[wanted[5:6], wanted[6:7]]}"

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
    """At a drafted position the tokens drafted before it count as drawn. What is kept stays counted, and what is not
    kept never was: the row draws what a row without drafts draws."""

    def check(driver: StepDriver) -> None:
        often, seldom, last = 3, 64, 65
        row = RowEdits(frequency=400.0, biases={often: 1000.0, seldom: 450.0, last: 20.0})
        result = driver.step(
            new={slot: (TEXT, [slot + 1]) for slot in (0, 1)},
            tokens={0: _NUM_TEXT, 1: _NUM_TEXT},
            edits={0: row, 1: row},
        )
        plain, found = rows_of(result)
        plain += [tokens_of(driver.step(tokens={0: 1}))[0] for _ in range(5)]
        assert plain == [often, often, seldom, often, seldom, last], f"without drafts: got {plain}"
        # The last sample draws `seldom` behind a draft that misses: were it counted, it would be missing later.
        found += rows_of(driver.step(tokens={1: 4}, drafts={1: [often, last, last]}))[0]
        assert found == plain[:3], f"with drafts: got {found}, expected {plain[:3]}"
        rewinds = {1: _NUM_TEXT + 2}
        for _ in range(3):
            found += tokens_of(driver.step(tokens={1: 1}, rewinds=rewinds))
            rewinds = {}
        assert found == plain, f"after drafts that were not kept: got {found}, expected {plain}"

    drafted(device, check)
