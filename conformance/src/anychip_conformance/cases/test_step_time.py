"""Steps, later: results that are fetched when the next step runs already, long runs of one program, and a request that
computes nothing but NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from anychip import SamplingParams
from anychip.step_messages import StepResult
from anychip_conformance.bad_values import in_range
from anychip_conformance.case import Nothing, kind
from anychip_conformance.cases.test_steps import TEXT, driven, expected
from anychip_conformance.device import Device
from anychip_conformance.engines import Checkpoint, checkpoint, open_llm, prompts
from anychip_conformance.equality import VOCAB_SIZE
from anychip_conformance.step_driver import StepDriver, tokens_of

_DEADLINE_S = 240.0
_OTHER = list(reversed(TEXT))
NEAR = 1e-4
"""Between log-probabilities of the same step, run twice."""


@kind("step.late_fetch", deadline_s=_DEADLINE_S)
def late_fetch(device: Device, case: Nothing) -> None:
    """Results that are fetched after the next step was started are those of their own step: ids, log-probabilities and
    scores; and a result that is fetched again is the same."""

    def check(driver: StepDriver) -> None:
        at_once = _answers(driver, late=False, leaving=[])
        later = _answers(driver, late=True, leaving=[1])
        for number, (found, again) in enumerate(later):
            wanted, _ = at_once[number]
            assert found == again, f"step {number + 1}, fetched twice: {found}, then {again}"
            ids, right = tokens_of(found), tokens_of(wanted)
            assert ids == right, f"step {number + 1}: {ids}, fetched at once {right}"
            _near(f"step {number + 1}", found, wanted)

    driven(device, check)


def _answers(driver: StepDriver, *, late: bool, leaving: list[int]) -> list[tuple[StepResult, StepResult]]:
    """Two requests, of which the second comes later and stays; every result fetched twice."""
    steps = [
        {"new": {0: (TEXT, [1])}, "tokens": {0: len(TEXT)}, "scored": {0}, "finished": leaving},
        {"new": {1: (_OTHER, [2])}, "tokens": {1: len(_OTHER)}},
        *[{"tokens": {0: 1, 1: 1}} for _ in range(4)],
        {"tokens": {1: 1}, "finished": [0]},
    ]
    found, waiting = [], []
    for given in steps:
        waiting.append(driver.begin(**given))  # type: ignore[arg-type]
        while len(waiting) > int(late):
            result = waiting.pop(0)
            found.append((result.fetch(), result.fetch()))
    return [*found, *((result.fetch(), result.fetch()) for result in waiting)]


def _near(what: str, found: StepResult, wanted: StepResult) -> None:
    assert found.logprobs.keys() == wanted.logprobs.keys(), f"{what}: log-probabilities of other rows"
    for row, entry in found.logprobs.items():
        off = abs(entry.chosen - wanted.logprobs[row].chosen)
        assert off <= NEAR, f"{what}, row {row}: a log-probability is off by {off:.2e}"
    for row, scores in wanted.prompt_logprobs.items():
        mine = [entry.chosen for entry in found.prompt_logprobs[row]]
        off = float(np.abs(np.subtract(mine, [entry.chosen for entry in scores])).max())
        assert off <= NEAR, f"{what}, row {row}: a score is off by {off:.2e}"


STEPS, DRAWS = 300, (4, 2, 3, 1)


@kind("step.long_run", deadline_s=_DEADLINE_S, quick=0)
def long_run(device: Device, case: Nothing) -> None:
    """Hundreds of steps of one program: requests come and go through slots and blocks that others had, and every one
    draws what the first drew."""

    def check(driver: StepDriver) -> None:
        wanted, zeroed = expected(device, max(DRAWS)), device.capabilities.stale_kv == "must_be_finite"
        drawn: dict[int, list[int]] = {}  # by slot
        held: dict[int, int] = {}  # by slot, its block
        draws: dict[int, int] = {}  # by slot, how many it will draw: no two steps end the same requests
        leaving: list[int] = []
        served = 0
        for step in range(STEPS):
            slot, block = step % 7, 1 + step % 11
            given: dict[str, Any] = {"tokens": dict.fromkeys(drawn, 1), "finished": leaving}
            if (step % 3 == 0 or not drawn) and slot not in drawn and block not in held.values():
                # Prompts run alone: not every device takes them beside single tokens.
                given |= {"new": {slot: (TEXT, [block])}, "tokens": {slot: len(TEXT)}, "zeros": [block] * zeroed}
                drawn[slot], held[slot], draws[slot] = [], block, DRAWS[step % len(DRAWS)]
            found = tokens_of(driver.step(**given))
            for row, token in zip(given["tokens"], found, strict=True):
                drawn[row].append(token)
            leaving = [row for row, ids in drawn.items() if len(ids) == draws[row]]
            for row in leaving:
                ids = drawn.pop(row)
                held.pop(row)
                served += 1
                assert ids == wanted[: len(ids)], f"request {served}, step {step + 1}: drew {ids}, expected {wanted}"
        assert served > STEPS // 8, f"{served} requests in {STEPS} steps"

    driven(device, check)


# -- a request of NaN ---------------------------------------------------------------------------------------------

NO_NUMBER = 500
"""The token whose embedding is NaN."""


class _Spoiled(Checkpoint):
    def __init__(self, family: str, head_dim: int) -> None:
        super().__init__(family, head_dim)
        with torch.no_grad():
            self.model.get_input_embeddings().weight[NO_NUMBER] = float("nan")
        self.model.save_pretrained(self.path)


def _spoiled(device: Device) -> Path:
    """The weights of `checkpoint`, but for one row of the embeddings."""
    head_dim = checkpoint(device, "llama").model.config.head_dim
    key = "checkpoint without a number"
    if key not in device.resources:
        device.resources[key] = _Spoiled("llama", head_dim)
    path: Path = device.resources[key].path
    return path


def _bad_text() -> list[int]:
    return [*TEXT[:5], NO_NUMBER, *TEXT[6:]]


@kind("step.bad_row", deadline_s=_DEADLINE_S)
def bad_row(device: Device, case: Nothing) -> None:
    """A request whose every value is NaN draws ids of the vocabulary; the requests beside it, and those that get its
    slot and its blocks afterwards, draw what they always do."""
    driver = StepDriver(device, _spoiled(device))
    try:
        wanted = expected(device, 3)
        new = {0: (TEXT, [1]), 1: (_bad_text(), [2]), 2: (TEXT, [3])}
        rows = [tokens_of(driver.step(new=new, tokens={slot: len(ids) for slot, (ids, _) in new.items()}))]
        rows += [tokens_of(driver.step(tokens={2: 1, 1: 1, 0: 1}))[::-1]]
        rows += [tokens_of(driver.step(tokens={0: 1, 1: 1, 2: 1}))]
        first, bad, last = zip(*rows, strict=True)
        in_range("ids of a request of NaN", torch.tensor(bad), VOCAB_SIZE)
        assert list(first) == wanted, f"in front of a request of NaN: drew {list(first)}, expected {wanted}"
        assert list(last) == wanted, f"behind a request of NaN: drew {list(last)}, expected {wanted}"
        zeros = [2] if device.capabilities.stale_kv == "must_be_finite" else []
        found = tokens_of(driver.step(new={1: (TEXT, [2])}, tokens={1: len(TEXT)}, finished=[1, 0, 2], zeros=zeros))
        found += tokens_of(driver.step(tokens={1: 1}))
        assert found == wanted[:2], f"after a request of NaN: drew {found}, expected {wanted[:2]}"
    finally:
        driver.close()


@kind("e2e.bad_row", deadline_s=_DEADLINE_S, quick=0)
def bad_request(device: Device, case: Nothing) -> None:
    """An engine whose requests are partly of NaN answers the others as it does without those, greedily and drawn, and
    goes on."""
    device.need_dtype("float32")  # in which no neighbour's rounding moves a draw
    texts = prompts()
    spoiled = [[*text[: len(text) // 2], NO_NUMBER, *text[len(text) // 2 + 1 :]] for text in texts[2:5]]
    for sampling in (
        SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True),
        SamplingParams(temperature=1.0, top_p=0.9, seed=3, max_tokens=6, ignore_eos=True),
    ):
        with open_llm(device, _spoiled(device), dtype="float32") as llm:
            alone = [output.outputs[0].token_ids for output in llm.generate(texts, sampling)]
            mixed = llm.generate([*spoiled, *texts], sampling)
        found = [output.outputs[0].token_ids for output in mixed]
        for ids in found[: len(spoiled)]:
            in_range("ids of a request of NaN", torch.tensor(ids), VOCAB_SIZE)
        for number, (ids, wanted) in enumerate(zip(found[len(spoiled) :], alone, strict=True)):
            assert ids == wanted, f"prompt {number} beside requests of NaN: drew {ids}, expected {wanted}"
