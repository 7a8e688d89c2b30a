"""Steps of a pipeline in simulated time: the real engine and scheduler, and stages that take a unit of it a step."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass

import pytest
from engine_kit import TOKEN, add_message, counts, make_core, make_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.engine.engine_core import EngineCore
from anychip.step_messages import LateInputs, StepDecision, StepResult
from anychip.worker_report import DeviceRules


@dataclass(slots=True)
class Simulated:
    """A step as the stages carry it out."""

    step_id: int
    num_samples: int
    begins: list[float]  # by stage
    ends: list[float]


class SimulatedStages:
    """executor.Executor of stages in time: one begins a step when it is free, the stage before has passed it on, and,
    on the first one, the ids that the step computes have come back. The engine's own time passes in `collect`, which
    waits, and as `engine_s` in every launch. `unit` says what a step takes on a stage."""

    def __init__(self, inner, num_stages: int, *, engine_s: float = 0.0, unit=lambda decision, stage: 1.0) -> None:
        self.inner, self.ready, self.num_stages = inner, inner.ready, num_stages
        self.engine_s, self.unit = engine_s, unit
        self.now = 0.0
        self.free = [0.0] * num_stages
        self.steps: dict[int, Simulated] = {}
        self._flying: deque[Simulated] = deque()
        self.most_in_flight = 0

    def launch(self, decision: StepDecision) -> None:
        self.now += self.engine_s
        at = self.now
        if decision.ids_behind:
            at = max(at, self.steps[decision.step_id - decision.ids_behind].ends[-1])
        step = Simulated(decision.step_id, self.inner._sampling[decision.step_id], [], [])
        for stage in range(self.num_stages):
            begin = max(at, self.free[stage])
            at = self.free[stage] = begin + self.unit(decision, stage)
            step.begins.append(begin)
            step.ends.append(at)
        self.steps[decision.step_id] = step
        self._flying.append(step)
        self.most_in_flight = max(self.most_in_flight, len(self._flying))

    def sample(self, late: LateInputs) -> None: ...

    def collect(self) -> StepResult:
        step = self._flying.popleft()
        self.now = max(self.now, step.ends[-1])
        return StepResult(step.step_id, array("i", [TOKEN] * step.num_samples).tobytes(), {})

    def busy(self, stage: int, since: float, until: float) -> float:
        """The share of a time in which a stage computes."""
        spans = (
            max(0.0, min(step.ends[stage], until) - max(step.begins[stage], since)) for step in self.steps.values()
        )
        return sum(spans) / (until - since)


def engine(num_stages: int, *, overlap: bool = True, engine_s: float = 0.0, unit=None, **scheduler) -> EngineCore:
    given = {"num_blocks": 512, "max_num_seqs": 32, "budget": 256, **scheduler}
    core = make_core(make_scheduler(num_stages=num_stages, **given), max_in_flight=num_stages + (1 if overlap else 0))
    more = {} if unit is None else {"unit": unit}
    core.executor = SimulatedStages(core.executor, num_stages, engine_s=engine_s, **more)
    return core


def run(core: EngineCore) -> dict[str, int]:
    """Tokens by request."""
    tokens: dict[str, int] = {}
    for _ in range(100_000):
        if not core.has_work:
            return tokens
        for delta in core.step():
            tokens[delta.request_id] = tokens.get(delta.request_id, 0) + len(delta.token_ids)
    raise AssertionError("the workload did not end")


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("num_stages", "requests"), [(2, 8), (2, 9), (3, 8), (4, 8)])
def test_each_stage_is_busy_while_requests_decode(num_stages, requests, overlap):
    """With 2 stages and 8 requests at least 0.9 of the time is asked for; the simulation's own figure is 1."""
    core = engine(num_stages, overlap=overlap)
    for index in range(requests):
        core.add(add_message(str(index), [10 + index] * 8, max_output=100))
    assert run(core) == {str(index): 100 for index in range(requests)}
    stages = core.executor
    filled = num_stages + 2.0  # prompts are computed, and the pipeline is full
    for stage in range(num_stages):
        assert stages.busy(stage, filled, stages.now - num_stages) >= 0.97
    assert stages.most_in_flight == num_stages + (1 if overlap else 0)


def test_the_engine_s_own_time_is_hidden_where_it_overlaps():
    """A tenth of a stage's time for every step."""
    busy = {}
    for overlap in (True, False):
        core = engine(2, overlap=overlap, engine_s=0.1)
        for index in range(8):
            core.add(add_message(str(index), [10 + index] * 8, max_output=100))
        run(core)
        busy[overlap] = core.executor.busy(0, 6.0, core.executor.now - 2)
    assert busy[True] >= 0.97 > busy[False]


def test_one_stage_alone_would_leave_the_other_idle_if_requests_took_no_turns():
    """What the turns are for: with all requests in one step, the stages work one after the other."""
    core = engine(2)
    core.scheduler._turns.share = lambda running: len(running)
    for index in range(8):
        core.add(add_message(str(index), [10 + index] * 8, max_output=100))
    run(core)
    assert core.executor.busy(0, 4.0, core.executor.now - 2) < 0.6


def test_a_request_alone_gets_a_token_every_round():
    core = engine(3)
    core.add(add_message("alone", [5] * 8, max_output=20))
    assert run(core) == {"alone": 20}
    assert core.executor.now == 60.0


def test_chunks_of_a_prompt_follow_each_other_without_a_gap():
    core = engine(3, budget=16)
    core.add(add_message("long", [5] * 160, max_output=1))
    run(core)
    assert core.executor.now == 10 + 2  # ten chunks, and two stages behind the first


def by_tokens(decision: StepDecision, stage: int) -> float:
    """What a stage takes for a step whose products take their time by tokens, beside weights that are read."""
    return max(64, sum(counts(decision)))


@pytest.mark.parametrize(("num_stages", "most"), [(2, 0.65), (4, 0.45)])
def test_prompts_that_come_together_keep_all_stages_busy(num_stages, most):
    """In one step, which the budget allows, each stage would wait for the others: `most` is a share of that time. With
    two stages half of it is what two processors can do."""
    took = {}
    for parts in (True, False):
        core = engine(num_stages, unit=by_tokens, num_blocks=2048, budget=4096, max_num_seqs=128)
        if not parts:
            core.scheduler._turns.tokens = lambda running, waiting: 4096
        for index in range(64):
            core.add(add_message(str(index), [10 + index] * 64, max_output=1))
        assert run(core) == {str(index): 1 for index in range(64)}
        took[parts] = core.executor.now
    assert took[False] == 4096 * num_stages
    assert took[True] <= most * took[False]


def test_few_prompts_are_one_step():
    """Parts of a prompt that is short would be steps in which weights are read for little."""
    core = engine(2, budget=4096)
    core.add(add_message("short", [5] * 200, max_output=1))
    run(core)
    assert len(core.executor.steps) == 1


def test_a_device_s_multiple_of_tokens_is_kept_in_parts():
    core = engine(2, budget=4096, num_blocks=1024, rules=DeviceRules(chunk_multiple=96))
    core.add(add_message("long", [5] * 2000, max_output=1))
    sizes, launch = [], core.executor.launch
    core.executor.launch = lambda decision: (sizes.append(sum(counts(decision))), launch(decision))
    run(core)
    assert sizes == [576, 576, 576, 272]


def test_turns_stay_even_when_requests_end():
    """Of 12 requests six end early; those that are left share the steps again."""
    core = engine(2)
    for index in range(12):
        core.add(add_message(str(index), [10 + index] * 4, max_output=12 if index < 6 else 200))
    sizes = []
    launch = core.executor.launch

    def watched(decision: StepDecision) -> None:
        sizes.append(len(counts(decision)))
        launch(decision)

    core.executor.launch = watched
    run(core)
    assert sizes[-60:-20] == [3] * 40


@settings(max_examples=60, deadline=None)
@given(
    num_stages=st.integers(2, 4),
    overlap=st.booleans(),
    blocks=st.integers(24, 80),
    caching=st.booleans(),
    requests=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=12),
    waits=st.lists(st.integers(0, 3), min_size=12, max_size=12),
)
def test_no_step_computes_ids_that_cannot_be_there(num_stages, overlap, blocks, caching, requests, waits):
    """Whatever arrives, is preempted and shares prefixes: every request ends with its tokens; a step's newest drawn ids
    are of a step before it, which `ids_behind` names; and no request is in a step whose ids it would wait for."""
    core = engine(num_stages, overlap=overlap, num_blocks=blocks, budget=24, prefix_caching=caching)
    newest: dict[int, int] = {}  # by slot, the step that drew its last token; 0: the workers were told it
    stages, schedule = core.executor, core.scheduler.schedule

    def watched():
        step = schedule()
        if step is not None:
            decision = step.decision
            slots = list(memoryview(decision.slots).cast("i"))
            for row in decision.new_rows:
                newest[row.slot] = 0
            drawn = max((newest[slot] for slot in slots), default=0)
            assert decision.ids_behind == (decision.step_id - drawn if drawn else 0)
            flying = {flight.step_id for flight in stages._flying}
            assert not drawn or decision.ids_behind >= num_stages or drawn not in flying
            for request in step.sampling:
                newest[request.slot] = decision.step_id
        return step

    core.scheduler.schedule = watched
    expected, tokens = {}, {}
    for index, ((prompt, output, kind), wait) in enumerate(zip(requests, waits, strict=False)):
        core.add(add_message(str(index), [kind] * prompt, max_output=output))
        expected[str(index)] = output
        for _ in range(wait):
            if core.has_work:
                for delta in core.step():
                    tokens[delta.request_id] = tokens.get(delta.request_id, 0) + len(delta.token_ids)
    for name, count in run(core).items():
        tokens[name] = tokens.get(name, 0) + count
    assert tokens == expected
    assert core.scheduler.kv.pool.num_free == core.scheduler.kv.pool.num_usable
