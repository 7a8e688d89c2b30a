"""A device that draws by a rule, and proposers that know the rule: what drafts change is seen token by token."""

from __future__ import annotations

import random
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec
from engine_kit import VOCAB_SIZE, make_core, make_scheduler
from hypothesis import strategies as st

from anychip.drafts import Draft
from anychip.engine.engine_core import EngineCore
from anychip.messages import AddRequest
from anychip.sampling_params import SamplingParams
from anychip.scheduler.step import ScheduledStep
from anychip.speculation.draft_model import DraftModel
from anychip.speculation.proposer import Proposer
from anychip.speculation.speculator import Speculator
from anychip.step_messages import StepResult

STOP = 2

WORKLOADS: dict[str, st.SearchStrategy[Any]] = {
    "prompts": st.lists(st.lists(st.integers(3, 12), min_size=1, max_size=20), min_size=1, max_size=5),
    "max_output": st.integers(1, 30),
    "n": st.integers(1, 2),
    "right": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    "max_drafts": st.integers(1, 6),
    "num_blocks": st.integers(32, 120),
    "budget": st.sampled_from([5, 9, 64]),
    "max_in_flight": st.integers(1, 2),
}
"""Requests, how often a guess about them is right, and an engine that is short of blocks and tokens in some."""


def drawn_after(ids: list[int], index: int) -> int:
    """What the device draws behind these tokens: few different ones, so that texts repeat themselves."""
    return 2 + (sum(ids[-3:]) * 7 + len(ids) * (index + 1) % 5) % 11


@dataclass
class Guesses:
    """Proposer and drafter: right and wrong drafts of changing lengths."""

    rng: random.Random
    right: float
    told: list[int] = field(default_factory=list)

    def begin(self, owner: str) -> Guesses:
        return Guesses(self.rng, self.right)

    def end(self, drafter: Guesses) -> None:
        pass

    def extend(self, token_ids) -> None:
        self.told += token_ids

    def catch_up(self, most: int) -> int:
        return most

    def draft(self, most: int) -> Draft:
        ids = list(self.told)
        for _ in range(self.rng.randrange(most + 1)):
            guess = drawn_after(ids, 0) if self.rng.random() < self.right else self.rng.randrange(2, 13)
            ids.append(guess)
        return Draft(ids[len(self.told) :], 5)


class Device:
    """executor.Executor that draws what `drawn_after` says, and remembers what stands in every block."""

    def __init__(self, core: EngineCore) -> None:
        self.core, self.steps, self.pending = core, {}, deque[ScheduledStep]()
        self.blocks: dict[int, dict[int, int]] = {}
        self.computed: dict[int, int] = {}  # by slot, as a worker knows it
        self.most_drafts = 0
        schedule = core.scheduler.schedule

        def watched() -> ScheduledStep | None:
            assert not any(step.drafts for step in self.pending), "nobody knows where its sequences stand"
            step = schedule()
            if step is not None:
                self.steps[step.decision.step_id] = step
                self._write(step)
            return step

        core.scheduler.schedule = watched
        core.executor.launch = lambda decision: self.pending.append(self.steps.pop(decision.step_id))
        core.executor.collect = self._collect

    def _write(self, step: ScheduledStep) -> None:
        for source, copy in step.decision.copies:
            self.blocks[copy] = dict(self.blocks[source])
        self.computed |= {row.slot: row.num_computed for row in step.decision.new_rows}
        rewinds = memoryview(step.decision.rewinds).cast("i")
        self.computed |= dict(zip(rewinds[::2], rewinds[1::2], strict=True))
        drafts = dict(zip(map(id, step.sampling), step.drafts or (), strict=False))
        counts = memoryview(step.decision.num_tokens).cast("i")
        for request, count in zip(step.requests, counts, strict=True):
            draft = drafts.get(id(request), ())
            self.most_drafts = max(self.most_drafts, len(draft))
            text = [*request.token_ids, *draft]
            assert self.computed[request.slot] == request.num_computed - count, "the worker's row stands elsewhere"
            self.computed[request.slot] = request.num_computed
            assert request.num_computed < request.num_prompt + request.max_output, "its last token is never computed"
            for at in range(request.num_computed - count, request.num_computed):
                size = self.core.scheduler.kv.groups[0].block_size
                block = request.block_ids[0][at // size]
                self.blocks.setdefault(block, {})[at % size] = text[at] if at < len(text) else -1

    def _collect(self) -> StepResult:
        step = self.pending.popleft()
        gained, ids = [], []
        for place, request in enumerate(step.sampling):
            text = request.token_ids
            for guess in (*(step.drafts[place] if step.drafts else ()), None):
                text.append(drawn_after(text, request.index))
                if guess != text[-1]:
                    break
            gained.append(len(text) - request.num_known)
            ids += text[request.num_known :]
        counts = array("i", gained).tobytes() if step.drafts else b""
        return StepResult(step.decision.step_id, array("i", ids).tobytes(), {}, num_gained=counts)

    def check_offers(self, offered: dict[int, list[int]]) -> None:
        """Every block on offer holds the tokens under whose hash it is offered."""
        for block, tokens in offered.items():
            found = [self.blocks[block][at] for at in range(len(tokens))]
            assert found == tokens, f"block {block} is offered as {tokens} and holds {found}"


def alone(prompt: list[int], index: int, max_output: int, stops=(STOP,)) -> list[int]:
    """A sequence, token by token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + max_output:
        ids.append(drawn_after(ids, index))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def speculating(proposer: Proposer, *, max_drafts: int = 4, **more) -> Speculator:
    """Every draft is tried, unless `more` has costs."""
    return Speculator(proposer, **{"max_drafts": max_drafts, "vocab_size": VOCAB_SIZE, "costs": None, **more})


def engine(speculator: Speculator | None, *, max_in_flight: int = 1, **scheduler) -> tuple[EngineCore, Device]:
    core = make_core(make_scheduler(speculator=speculator, **scheduler), max_in_flight=max_in_flight)
    return core, Device(core)


def run(core: EngineCore, messages: list[AddRequest], each=lambda: None) -> dict[tuple[str, int], list[int]]:
    for message in messages:
        core.add(message)
    found: dict[tuple[str, int], list[int]] = {}
    for _ in range(3000):
        if not core.has_work:
            return found
        for delta in core.step():
            found.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
        each()
    raise AssertionError("the workload did not end")


def message(name: str, prompt: list[int], max_output: int, n: int = 1, stops=(STOP,), **more) -> AddRequest:
    sampling, ids = SamplingParams(max_tokens=max_output, n=n), array("i", prompt).tobytes()
    return AddRequest(name, ids, sampling, max_output, stops, **more)


class ModelDevice(Device):
    """Its draft model guesses right with the probability `right`, and has not caught up with some rows."""

    def __init__(self, core: EngineCore, rng: random.Random, right: float, caught_up: float = 0.9) -> None:
        super().__init__(core)
        self.rng, self.right, self.caught_up = rng, right, caught_up
        self.num_proposed = 0

    def _write(self, step: ScheduledStep) -> None:
        super()._write(step)
        size = self.core.scheduler.kv.groups[0].block_size
        for request, _, count in step.proposing:  # the last guess is no input of a pass
            tokens = request.num_computed + count
            assert len(request.block_ids[0]) * size >= tokens, "a guess has no block"
            assert tokens < request.num_prompt + request.max_output, "a guess that nobody can draw"

    def _collect(self) -> StepResult:
        step = self.pending[0]
        result = super()._collect()
        ends = dict(zip(map(id, step.sampling), self._texts(step, result), strict=True))
        proposed = []
        for request, _, count in step.proposing:
            text = list(ends[id(request)])
            for _ in range(count):
                is_right = self.rng.random() < self.right
                text.append(drawn_after(text, request.index) if is_right else self.rng.randrange(2, 13))
            lacks = self.rng.random() > self.caught_up
            proposed += [-1] * count if lacks else text[-count:]
        self.num_proposed += len(proposed)
        return msgspec.structs.replace(result, proposed=array("i", proposed).tobytes())

    def _texts(self, step: ScheduledStep, result: StepResult) -> list[list[int]]:
        """The sampling rows' texts behind a step."""
        gained = memoryview(result.num_gained).cast("i").tolist() or [1] * len(step.sampling)
        ids, texts = memoryview(result.token_ids).cast("i").tolist(), []
        for request, count in zip(step.sampling, gained, strict=True):
            texts.append([*request.token_ids, *ids[:count]])
            del ids[:count]
        return texts


def drafting_engine(
    rng: random.Random,
    right: float,
    *,
    max_drafts: int = 4,
    max_in_flight: int = 1,
    costs=None,
    draft_costs=None,
    **more,
) -> tuple[EngineCore, ModelDevice]:
    """An engine whose workers have a draft model."""
    speculator = speculating(
        DraftModel(), max_drafts=max_drafts, costs=costs, draft_costs=draft_costs, drafts_in_workers=True
    )
    core = make_core(make_scheduler(speculator=speculator, **more), max_in_flight=max_in_flight)
    return core, ModelDevice(core, rng, right)
