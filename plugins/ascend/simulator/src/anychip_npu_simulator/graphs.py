"""ACL graphs: what runs while a stream is captured is written down with its arguments, and done again at every replay.

The vendor's own NPUGraph and graph_task_* run above this: cann/graphs.c hands their calls on. As on a device, a replay
reads and writes the addresses of the capture, and host arguments are those of the capture unless a task group's update
replaced them. What a device computes wrong without a word is refused here: a replay whose lengths were not renewed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from anychip_npu_simulator.errors import GraphRefused
from anychip_npu_simulator.machine import machine
from anychip_npu_simulator.memory import tensors

if TYPE_CHECKING:
    from anychip_npu_simulator.calls import Arguments, Simulated


@dataclass(slots=True)
class Task:
    """One recorded call: `run` writes the results to the addresses of the capture."""

    name: str
    run: Callable[[], None]
    addresses: tuple[int, ...] = ()
    """Of the results: an update writes where the capture wrote."""
    lengths: dict[str, Any] = field(default_factory=dict)
    """Host arguments that differ from step to step."""


@dataclass(slots=True)
class Group:
    """Tasks between graph_task_group_begin and _end. `fresh`: updated since the last replay."""

    number: int
    tasks: list[Task] = field(default_factory=list)
    fresh: bool = False


@dataclass(slots=True)
class Captured:
    number: int
    steps: list[Task | Group] = field(default_factory=list)
    streams: set[int] = field(default_factory=set)


@dataclass(slots=True)
class State:
    """Of the process, as the runtime's own state is."""

    capture: Captured | None = None
    group: Group | None = None
    renewed: tuple[Group, list[Task]] | None = None
    graphs: dict[int, Captured] = field(default_factory=dict)
    groups: dict[int, Group] = field(default_factory=dict)
    events: dict[int, bool] = field(default_factory=dict)
    """External events: recorded, and not reset since."""
    next_number: int = 1
    broken: GraphRefused | None = None


state = State()
"""What hooks.py moves on."""


def active() -> bool:
    return state.capture is not None


def updating() -> bool:
    return state.renewed is not None


def host_read(name: str) -> GraphRefused:
    refusal = GraphRefused(name, "call", "within a captured graph", "what needs no value on the host and no wait")
    state.broken = refusal
    return refusal


def _write(targets: list[Tensor], result: Any) -> None:
    for target, value in zip(targets, tensors(result), strict=True):
        target.copy_(value)


def add(task: Task) -> None:
    assert state.capture is not None
    if state.group is not None:
        state.group.tasks.append(task)
    else:
        state.capture.steps.append(task)


def record(name: str, op: Callable[..., Any], args: Any, kwargs: Any, targets: list[Tensor]) -> None:
    """An op of torch. Without targets it wrote into its own arguments."""

    def run() -> None:
        result = op(*args, **kwargs)
        if targets:
            _write(targets, result)

    add(Task(name, run))


def record_call(name: str, run: Callable[[], None]) -> None:
    """Anything else that a stream does: a collective."""
    add(Task(name, run))


def _npu_task(op: Simulated, given: Arguments, targets: list[Tensor]) -> Task:
    lengths = {name: getattr(given, name) for name in op.host_lengths if getattr(given, name, None) is not None}

    def run() -> None:
        result = op.compute(given)
        if targets:
            _write(targets, result)

    return Task(op.name, run, tuple(t.data_ptr() for t in targets), lengths)


def record_npu(op: Simulated, given: Arguments, targets: list[Tensor]) -> None:
    add(_npu_task(op, given, targets))


def update(op: Simulated, given: Arguments) -> None:
    """A call between graph_task_update_begin and _end: the arguments of the group's next replay."""
    assert state.renewed is not None
    group, tasks = state.renewed
    out = tensors(getattr(given, "out", None))
    if not out:
        allowed = "the variant .out with the tensors of the capture"
        raise GraphRefused(op.name, "out", "not given in a task update", allowed)
    task = _npu_task(op, given, out)
    place = len(tasks)
    old = group.tasks[place] if place < len(group.tasks) else None
    if old is None or old.name != op.name:
        captured = [t.name for t in group.tasks]
        raise GraphRefused(op.name, "call", f"number {place} of a task update", f"the calls of the capture: {captured}")
    if old.addresses != task.addresses:
        raise GraphRefused(op.name, "out", "at other addresses than in the capture", "the tensors of the capture")
    tasks.append(task)


def _check_fresh(task: Task, group: Group | None) -> None:
    if not task.lengths or machine().allows_stale:
        return
    name, value = next(iter(task.lengths.items()))
    if group is None:
        allowed = "a call within graph_task_group_begin and _end, whose lengths can be renewed"
        raise GraphRefused(task.name, name, f"frozen at {list(value)}, outside of a task group", allowed)
    if not group.fresh:
        allowed = "a graph_task_update of the group before every replay"
        raise GraphRefused(task.name, name, f"stale: still {list(value)} of the last update", allowed)


def replay(number: int) -> None:
    graph = state.graphs[number]
    for step in graph.steps:
        for task in step.tasks if isinstance(step, Group) else [step]:
            _check_fresh(task, step if isinstance(step, Group) else None)
    for step in graph.steps:
        for task in step.tasks if isinstance(step, Group) else [step]:
            task.run()
        if isinstance(step, Group):
            step.fresh = False


def num_streams_held() -> int:
    """Streams that captured graphs hold, the one being captured among them."""
    held = sum(len(graph.streams) for graph in state.graphs.values())
    return held + (len(state.capture.streams) if state.capture else 0)
