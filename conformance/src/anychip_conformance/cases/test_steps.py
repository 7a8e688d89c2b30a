"""The worker, step by step, on whichever seam the device has: promised ids, block edits, masks, compilations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from anychip.plugin_api import GraphLevel
from anychip_conformance.case import Nothing, kind
from anychip_conformance.choices import widest
from anychip_conformance.device import Device
from anychip_conformance.engines import checkpoint, open_llm, prompts
from anychip_conformance.equality import VOCAB_SIZE
from anychip_conformance.step_driver import RowEdits, StepDriver, tokens_of

_DEADLINE_S = 120.0
TEXT = [17, 301, 44, 9, 260, 131, 77, 402, 5, 88, 19, 333]


def driven(device: Device, check: Callable[[StepDriver], None]) -> None:
    driver = StepDriver(device, checkpoint(device, "llama").path)
    try:
        check(driver)
    finally:
        driver.close()


def continued(driver: StepDriver, blocks: list[int], count: int, slot: int = 0) -> list[int]:
    """Tokens of TEXT's continuation by a request that holds `blocks`."""
    found = tokens_of(driver.step(new={slot: (TEXT, blocks)}, tokens={slot: len(TEXT)}))
    for _ in range(count - 1):
        found += tokens_of(driver.step(tokens={slot: 1}))
    return found


def expected(device: Device, count: int) -> list[int]:
    model, ids = checkpoint(device, "llama"), list(TEXT)
    for _ in range(count):
        ids.append(int(model.logits(ids, widest(device.capabilities)).argmax()))
    return ids[len(TEXT) :]


def most_likely(device: Device, ids: list[int], *, without: set[int]) -> int:
    """The likeliest token after `ids`, some left out."""
    logits = checkpoint(device, "llama").logits(ids, widest(device.capabilities))
    logits[list(without)] = -np.inf
    return int(logits.argmax())


@kind("step.promised_ids", deadline_s=_DEADLINE_S)
def promised_ids(device: Device, case: Nothing) -> None:
    """An input id of -1 is the slot's last sampled token, which only the device knows: slots do not mix."""

    def check(driver: StepDriver) -> None:
        wanted = expected(device, 3)
        other = list(reversed(TEXT))
        first = tokens_of(driver.step(new={2: (TEXT, [1]), 0: (other, [2])}, tokens={2: len(TEXT), 0: len(other)}))
        second = tokens_of(driver.step(tokens={0: 1, 2: 1}))
        third = tokens_of(driver.step(tokens={2: 1, 0: 1}))
        assert [first[0], second[1], third[0]] == wanted, f"got {[first[0], second[1], third[0]]}, expected {wanted}"

    driven(device, check)


@kind("step.edit", deadline_s=_DEADLINE_S)
def edit(device: Device, case: Nothing) -> None:
    """Blocks copied and then zeroed between steps, a copy's source among the zeroed: a request that moves to the copies
    goes on as before."""

    def check(driver: StepDriver) -> None:
        wanted = expected(device, 4)
        first = continued(driver, [1], 2)
        assert first == wanted[:2], f"got {first}, expected {wanted[:2]}"
        known = [*TEXT, *first]
        # The request leaves; its block is copied on, and zeroed; another takes the copy over with its last token.
        driver.step(tokens={1: 1}, new={1: ([3], [9])}, finished=[0], copies=[(1, 4), (4, 5)], zeros=[1, 4])
        result = driver.step(new={3: (known, [5])}, computed={3: len(known) - 1}, tokens={3: 1}, finished=[1])
        assert tokens_of(result) == wanted[2:3], f"got {tokens_of(result)}, expected {wanted[2:3]}"
        moved = driver.step(tokens={3: 1}, copies=[(5, 7)])
        assert tokens_of(moved) == wanted[3:], f"got {tokens_of(moved)}, expected {wanted[3:]}"

    driven(device, check)


@kind("step.cotenants", deadline_s=_DEADLINE_S)
def cotenants(device: Device, case: Nothing) -> None:
    """Rows come and go, and steps change shape, one that draws nothing among them; a request's tokens stay the same."""

    def check(driver: StepDriver) -> None:
        wanted, finished = expected(device, 4), []
        if device.platform.step_rules.chunk_multiple == 1:
            nothing = tokens_of(driver.step(new={4: (TEXT, [6])}, tokens={4: 5}))
            assert nothing == [], f"part of a prompt: drew {nothing}"
            finished = [4]
        found = tokens_of(driver.step(new={0: (TEXT, [1])}, tokens={0: len(TEXT)}, finished=finished))
        found += tokens_of(driver.step(new={1: ([7, 8, 9], [2])}, tokens={0: 1, 1: 3}))[:1]
        found += tokens_of(driver.step(new={2: ([5] * 7, [3]), 3: ([6], [4])}, tokens={0: 1, 2: 7, 3: 1, 1: 1}))[:1]
        found += tokens_of(driver.step(tokens={3: 1, 0: 1}, finished=[1, 2]))[1:]
        assert found == wanted, f"got {found}, expected {wanted}"

    driven(device, check)


@kind("step.masks", deadline_s=_DEADLINE_S)
def masks(device: Device, case: Nothing) -> None:
    """A row's mask holds for that row alone; log-probabilities are of the logits before it."""

    def check(driver: StepDriver) -> None:
        wanted = expected(device, 1)[0]
        allowed = {3, 64, VOCAB_SIZE - 1} - {wanted}
        result = driver.step(
            new={0: (TEXT, [1]), 1: (TEXT, [2])}, tokens={0: len(TEXT), 1: len(TEXT)}, masks={0: allowed}
        )
        masked, free = tokens_of(result)
        assert masked in allowed and free == wanted, f"got {masked} and {free}, expected one of {allowed} and {wanted}"
        assert result.logprobs[0].top_ids[0] == wanted, "a mask has moved the log-probabilities"

    driven(device, check)


@kind("step.edits", deadline_s=_DEADLINE_S)
def edits(device: Device, case: Nothing) -> None:
    """A row's biases hold for that row alone, few or many, for as long as it has its slot, and come before its mask;
    log-probabilities are of the logits before them."""

    def check(driver: StepDriver) -> None:
        wanted = expected(device, 1)[0]
        other, third = [token for token in (3, 64, 65) if token != wanted][:2]
        every_but_one = {token: -100.0 for token in range(VOCAB_SIZE) if token != other}
        result = driver.step(
            new={slot: (TEXT, [slot + 1]) for slot in range(4)},
            tokens={slot: len(TEXT) for slot in range(4)},
            edits={
                0: RowEdits(biases={wanted: -100.0, other: 100.0}),
                2: RowEdits(biases=every_but_one),
                3: RowEdits(biases={other: 100.0}),
            },
            masks={3: {third}},
        )
        found = tokens_of(result)
        assert found == [other, wanted, other, third], f"got {found}, expected {[other, wanted, other, third]}"
        assert result.logprobs[0].top_ids[0] == wanted, "an edit has moved the log-probabilities"
        # The next owner of slot 0 has another bias, that of slot 3 has none.
        found = tokens_of(
            driver.step(
                new={0: (TEXT, [1]), 3: (TEXT, [4])}, tokens={0: len(TEXT), 2: 1, 3: len(TEXT)}, finished=[0, 1, 3],
                edits={0: RowEdits(biases={third: 100.0})},
            )
        )  # fmt: skip
        assert found == [third, other, wanted], f"got {found}, expected {[third, other, wanted]}"

    driven(device, check)


_AGAIN = 3
"""Draws of a token whose bias is 1000 where each takes 400 off."""


@kind("step.penalties", deadline_s=_DEADLINE_S)
def penalties(device: Device, case: Nothing) -> None:
    """Tokens of the prompt count for the repetition penalty, and drawn tokens for all three, the newest too. Each row
    counts for itself, wherever it stands in the step; rows without penalties draw what they always do."""

    def check(driver: StepDriver) -> None:
        plain = expected(device, 4)
        first, second = TEXT[:2]
        repeated = plain[1]  # what padded rows draw beside the plain row
        rows = {
            0: RowEdits(frequency=400.0, biases={repeated: 1000.0}),
            1: RowEdits(repetition=1e4),
            2: RowEdits(presence=500.0, biases={first: 1000.0, second: 900.0}),
        }
        found: dict[int, list[int]] = {slot: [] for slot in range(4)}
        for step, order in enumerate(([3, 0, 1, 2], [3, 2, 1, 0], [3, 0, 1, 2], [1, 3, 2, 0])):
            new = {slot: (TEXT, [slot + 1]) for slot in order} if step == 0 else {}
            result = driver.step(new=new, tokens={slot: 1 if step else len(TEXT) for slot in order}, edits=rows)
            for slot, token in zip(order, tokens_of(result), strict=True):
                found[slot].append(token)
        assert found[3] == plain, f"without penalties: got {found[3]}, expected {plain}"
        assert found[2] == [first, second, first, first], f"presence: got {found[2]}"
        unlike = most_likely(device, [*TEXT, *[repeated] * _AGAIN], without={repeated})
        assert found[0] == [*[repeated] * _AGAIN, unlike], f"frequency: got {found[0]}, expected {unlike} at the end"
        seen = list(TEXT)
        for token in found[1]:
            wanted = most_likely(device, seen, without=set(seen))
            assert token == wanted, f"repetition after {len(seen)} tokens: got {token}, expected {wanted}"
            seen.append(token)

    driven(device, check)


@kind("step.penalties_anew", deadline_s=_DEADLINE_S)
def penalties_anew(device: Device, case: Nothing) -> None:
    """A slot's next owner begins with its own counts, and a request that enters anew has its output counted once,
    whichever slot it comes to."""

    def check(driver: StepDriver) -> None:
        token = 3
        row = RowEdits(frequency=400.0, biases={token: 1000.0})
        found = tokens_of(driver.step(new={0: (TEXT, [1])}, tokens={0: len(TEXT)}, edits={0: row}))
        for _ in range(_AGAIN - 1):
            found += tokens_of(driver.step(tokens={0: 1}))
        assert found == [token] * _AGAIN, f"got {found}, expected {token} {_AGAIN} times"
        # Another request takes the slot over; the first, which had drawn one token, enters another slot.
        preempted = RowEdits(frequency=400.0, biases={token: 1000.0}, num_output=1)
        results = [
            driver.step(
                new={0: (TEXT, [1]), 2: ([*TEXT, token], [2])}, tokens={0: len(TEXT), 2: len(TEXT) + 1}, finished=[0],
                edits={0: row, 2: preempted},
            )
        ]  # fmt: skip
        results += [driver.step(tokens={0: 1, 2: 1}) for _ in range(_AGAIN)]
        next_owner, returned = zip(*map(tokens_of, results), strict=True)
        assert next_owner[:_AGAIN] == (token,) * _AGAIN, f"the slot's next owner: got {next_owner}"
        assert returned[: _AGAIN - 1] == (token,) * (_AGAIN - 1), f"the request that came back: got {returned}"
        assert token not in (next_owner[_AGAIN], *returned[_AGAIN - 1 :]), "a token was counted too seldom"

    driven(device, check)


@kind("step.scores", deadline_s=_DEADLINE_S)
def scores(device: Device, case: Nothing) -> None:
    """A prompt's log-probabilities are those of its tokens after the ones before them, in one step and in several,
    beside rows that ask for none; the last token's follower is nobody's to score."""

    def check(driver: StepDriver) -> None:
        split = 5
        both = {0: (TEXT, [1]), 1: (TEXT, [2]), 2: (TEXT, [3])}
        first = driver.step(new=both, tokens={0: len(TEXT), 1: split, 2: len(TEXT)}, scored={0, 1})
        rest = driver.step(tokens={0: 1, 1: len(TEXT) - split})
        whole, parts = first.prompt_logprobs[0], first.prompt_logprobs[1] + rest.prompt_logprobs[1]
        assert set(first.prompt_logprobs) == {0, 1} and set(rest.prompt_logprobs) == {1}, "rows that asked for none"
        assert len(whole) == len(parts) == len(TEXT) - 1, f"{len(whole)} and {len(parts)} of {len(TEXT) - 1} scores"
        for position, token in enumerate(TEXT[1:]):
            # What a draw after the same tokens reports, where only that token may be drawn, is the measure.
            prefix = TEXT[: position + 1]
            last = driver.step(
                new={3: (prefix, [4])}, tokens={3: len(prefix)}, finished=[3], masks={0: {token}}
            ).logprobs[0]
            for found in (whole[position], parts[position]):
                assert found.top_ids[0] == last.top_ids[0], f"after {position + 1} tokens: another likeliest token"
                near = abs(found.top[0] - last.top[0]) < NEAR and abs(found.chosen - last.chosen) < NEAR
                assert near, f"token {position + 1}: {found.chosen}, expected {last.chosen}"

    driven(device, check)


NEAR = 0.05
"""Between log-probabilities of one position computed in steps of different shapes, in bfloat16."""


@kind("step.zeroed", deadline_s=_DEADLINE_S)
def zeroed(device: Device, case: Nothing) -> None:
    """Blocks that another request has filled and given up do not show through, whether they were zeroed or not."""

    def check(driver: StepDriver) -> None:
        wanted = expected(device, 2)
        loud = [511] * min(driver.block_size, 40)
        driver.step(new={0: (loud, [1])}, tokens={0: len(loud)})
        zeros = [1] if device.capabilities.stale_kv == "must_be_finite" else []
        found = tokens_of(driver.step(new={4: (TEXT, [1])}, tokens={4: len(TEXT)}, finished=[0], zeros=zeros))
        found += tokens_of(driver.step(tokens={4: 1}))
        assert found == wanted, f"got {found}, expected {wanted}"

    driven(device, check)


@kind("step.no_compilation", deadline_s=_DEADLINE_S)
def no_compilation(device: Device, case: Nothing) -> None:
    """After warm-up nothing is compiled any more: preparing the same shapes again finds as many programs as before.
    Graphs that may be captured when a step first needs them are captured by runs of the same requests before it: with
    an empty prefix cache, and with a full one."""
    prepares = device.manifest.seam == "step" or device.capabilities.graph_level > GraphLevel.NONE
    device.limit("it prepares neither steps nor graphs", prepares)
    with open_llm(device, checkpoint(device, "llama").path) as llm:
        worker = llm.engine.executor.worker  # type: ignore[attr-defined]
        if device.platform.graph_capture().lazy:
            for _ in range(2):
                llm.generate(prompts())
        before = worker.program.warm_up([]).num_programs
        llm.generate(prompts())
        after = worker.program.warm_up([]).num_programs
    assert after == before, f"{after - before} programs were compiled while requests ran"
