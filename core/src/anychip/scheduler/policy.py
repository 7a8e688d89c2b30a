"""Orders requests. A device's limits are not policies: they are StepRules, and every policy obeys them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from anychip.registry.blame import made_by_name
from anychip.request import Request

Key = tuple[float, ...]


class SchedulingPolicy:
    """Requests run in ascending order of `key`, and are preempted from the end. The key of a request must not
    change while it waits or runs: what it depends on is fixed when the request arrives. This one is fcfs: first come,
    first served."""

    def arrived(self, request: Request) -> None:
        """Called once for each request, before its first `key`; may set `request.rank`."""

    def started(self, request: Request) -> None:
        """The request has been given a slot."""

    def ended(self, request: Request) -> None:
        """The request is over, however it ended."""

    def key(self, request: Request) -> Key:
        return (request.arrival,)


class PriorityPolicy(SchedulingPolicy):
    """Lower priority numbers first; among equals, first come."""

    def key(self, request: Request) -> Key:
        return (request.priority, request.arrival)


class FairPolicy(SchedulingPolicy):
    """Tenants share the device evenly: start-time fair queueing over their requests' tokens.

    A request begins, in virtual time, where its tenant's one before ends, and not before now; now is the beginning of
    the latest request that was started. A tenant who sends ten times as much waits behind its own requests, not others
    behind it. Source: Goyal, Vin and Cheng, "Start-time Fair Queueing", 1996.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[str, float] = {}

    def arrived(self, request: Request) -> None:
        request.rank = max(self._now, self._ends.get(request.tenant, 0.0))
        self._ends[request.tenant] = request.rank + request.num_prompt + request.max_output

    def started(self, request: Request) -> None:
        if request.rank > self._now:
            self._now = request.rank
            self._ends = {tenant: end for tenant, end in self._ends.items() if end > self._now}

    def key(self, request: Request) -> Key:
        return (request.rank, request.arrival)


class PredictivePolicy(SchedulingPolicy):
    """The shortest predicted work first, by what a tenant's requests took before; each token of work is worth a wait
    of PATIENCE_S, so that nobody is overtaken for ever."""

    PATIENCE_S = 0.02
    _NEWEST = 0.2
    """Weight of the newest length in the prediction."""

    def __init__(self) -> None:
        self._lengths: OrderedDict[str, float] = OrderedDict()

    def arrived(self, request: Request) -> None:
        expected = self._lengths.get(request.tenant)
        output = request.max_output if expected is None else min(expected, request.max_output)
        request.rank = request.arrived_at + self.PATIENCE_S * (output + request.num_prompt / 8)

    def ended(self, request: Request) -> None:
        if request.finish_reason == "abort" or request.pools:
            return
        before = self._lengths.pop(request.tenant, float(request.num_output))
        self._lengths[request.tenant] = before + self._NEWEST * (request.num_output - before)
        if len(self._lengths) > _REMEMBERED_TENANTS:
            self._lengths.popitem(last=False)

    def key(self, request: Request) -> Key:
        return (request.rank, request.arrival)


_REMEMBERED_TENANTS = 4096

POLICIES = {
    "fcfs": "anychip.scheduler.policy:SchedulingPolicy",
    "priority": "anychip.scheduler.policy:PriorityPolicy",
    "fair": "anychip.scheduler.policy:FairPolicy",
    "predictive": "anychip.scheduler.policy:PredictivePolicy",
}


def make_policy(name: str, contributed: Mapping[str, str]) -> SchedulingPolicy:
    """`contributed` maps names to the dotted classes that plugins bring. Raises ConfigError for others."""
    policy: SchedulingPolicy = made_by_name(name, POLICIES, contributed, unknown=f"policy {name!r} does not exist")
    return policy
