"""Order among requests. A device's limits are not policies: they are StepRules, which every policy obeys."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from anychip.errors import ConfigError
from anychip.request import Request

Key = tuple[float, ...]


class SchedulingPolicy:
    """Requests run in ascending order of `key`, and are preempted from the end. The key of a request must not
    change while it waits or runs. This one is fcfs: first come, first served."""

    def key(self, request: Request) -> Key:
        return (request.arrival,)


class PriorityPolicy(SchedulingPolicy):
    """Lower priority numbers first; among equals, first come."""

    def key(self, request: Request) -> Key:
        return (request.priority, request.arrival)


POLICIES = {
    "fcfs": "anychip.scheduler.policy:SchedulingPolicy",
    "priority": "anychip.scheduler.policy:PriorityPolicy",
}


def make_policy(name: str, contributed: Mapping[str, str]) -> SchedulingPolicy:
    """`contributed` maps names to the dotted classes that plugins bring. Raises ConfigError for others."""
    dotted = POLICIES.get(name) or contributed.get(name)
    if dotted is None:
        raise ConfigError(f"policy {name!r} does not exist; there are {', '.join(sorted({*POLICIES, *contributed}))}")
    module, _, cls = dotted.partition(":")
    policy: SchedulingPolicy = getattr(import_module(module), cls)()
    return policy
