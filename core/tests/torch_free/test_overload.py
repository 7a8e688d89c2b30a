"""Admission and policies under load, simulated: the real scheduler, a fake executor of fixed speed, and time as a
number that the simulation moves."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache

import pytest
from engine_kit import answer, make_request, make_scheduler

from anychip.observability.flow import Flow
from anychip.request import Request
from anychip.scheduler.policy import make_policy

STEP_S = 0.02
SLOTS = 8
PROMPT, OUTPUT = 48, 12


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Run:
    first_token_s: list[float] = field(default_factory=list)
    by_tenant: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    refused: int = 0


def simulate(
    rate: float,
    *,
    seconds: float,
    max_wait_s: float | None = None,
    policy: str = "fcfs",
    tenants: dict[str, float] | None = None,
) -> Run:
    """Poisson arrivals at `rate` a second; `tenants` have shares of it, and those of "short" ask for little."""
    rng, clock, run = random.Random(1), Clock(), Run()
    flow, waits = Flow(clock), {}
    scheduler = make_scheduler(
        num_blocks=2000, max_num_seqs=SLOTS, budget=64, prefix_caching=False, policy=make_policy(policy, {})
    )
    shares = tenants or {"": 1.0}
    arrival, number = rng.expovariate(rate), 0
    while clock.now < seconds:
        while arrival <= clock.now:
            tenant = rng.choices(list(shares), list(shares.values()))[0]
            if flow.admits(max_wait_s):
                flow.enter()
                output = 4 if tenant == "short" else OUTPUT
                request: Request = make_request(
                    str(number), [5] * PROMPT, max_output=output, arrival=number, tenant=tenant
                )
                request.arrived_at = arrival
                scheduler.add(request)
                waits[request.request_id] = (arrival, tenant)
            else:
                run.refused += 1
            number += 1
            arrival += rng.expovariate(rate)
        step = scheduler.schedule()
        if step is None:
            clock.now = max(clock.now, arrival)
            continue
        clock.now += STEP_S
        for delta in answer(scheduler, step):
            found = waits.pop(delta.request_id, None)
            if found is not None:
                flow.leave(served=True)
                run.first_token_s.append(clock.now - found[0])
                run.by_tenant[found[1]].append(clock.now - found[0])
    return run


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


@cache
def capacity() -> float:
    """Requests a second that the fake executor serves when more are always there."""
    return len(simulate(200, seconds=20).first_token_s) / 20


def test_at_ten_times_the_rate_admitted_requests_wait_no_longer_than_at_a_busy_time():
    rate = capacity()
    busy = simulate(0.8 * rate, seconds=120)
    limit = p99(busy.first_token_s)
    flooded = simulate(10 * rate, seconds=120, max_wait_s=limit)
    assert flooded.refused > 0.8 * 10 * rate * 120
    assert p99(flooded.first_token_s) <= 1.5 * limit
    # And the device has as much to do as it can: refusing is not idling.
    assert len(flooded.first_token_s) >= 0.95 * rate * 120


def test_without_a_limit_they_would_wait_for_ever():
    rate = capacity()
    assert p99(simulate(10 * rate, seconds=30).first_token_s) > 10 * p99(simulate(0.8 * rate, seconds=30).first_token_s)


def test_fair_protects_those_who_ask_for_little_from_those_who_flood():
    rate = capacity()
    tenants = {"flood": 0.95, "calm": 0.05}
    fcfs = simulate(2 * rate, seconds=40, tenants=tenants)
    fair = simulate(2 * rate, seconds=40, tenants=tenants, policy="fair")
    assert p99(fair.by_tenant["calm"]) < 0.05 * p99(fcfs.by_tenant["calm"])
    assert len(fair.first_token_s) == pytest.approx(len(fcfs.first_token_s), rel=0.05)


def test_predictive_lets_short_work_pass_and_starves_nobody():
    rate = capacity()
    tenants = {"short": 0.5, "long": 0.5}
    fcfs = simulate(1.05 * rate, seconds=60, tenants=tenants)
    predictive = simulate(1.05 * rate, seconds=60, tenants=tenants, policy="predictive")
    mean = {name: sum(run.first_token_s) / len(run.first_token_s) for name, run in (("f", fcfs), ("p", predictive))}
    assert mean["p"] <= mean["f"]
    assert max(predictive.by_tenant["long"]) < 4 * max(fcfs.by_tenant["long"])


def test_idle_time_is_not_taken_for_slowness():
    clock = Clock()
    flow = Flow(clock)
    for _ in range(20):  # one request every ten seconds, each served within 50 ms
        clock.now += 10
        flow.enter()
        clock.now += 0.05
        flow.leave(served=True)
    assert flow.wait_s(10) == pytest.approx(0.5)
    assert flow.retry_after_s() == 1


def test_an_unknown_rate_refuses_nobody():
    flow = Flow(Clock())
    for _ in range(1000):
        assert flow.admits(0.001)
        flow.enter()
    assert flow.retry_after_s() == 1
