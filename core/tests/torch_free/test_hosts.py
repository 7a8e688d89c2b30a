"""Hosts as the engine sees them: who may join, who is missing, who is gone. The agents are sockets of the test."""

from __future__ import annotations

import argparse
import contextlib
import time

import msgspec
import pytest
import zmq

from anychip.config import EngineConfig
from anychip.entrypoints.cli.options import add_engine_options, engine_arguments, engine_config
from anychip.environment import Environment
from anychip.errors import ConfigError, DeviceUnavailable, EngineDead
from anychip.keyed_sockets import ClusterKey, KeyedContext
from anychip.launch.hosts import control
from anychip.launch.hosts.control import Hosts
from anychip.launch.hosts.meeting import Meeting
from anychip.launch.hosts.messages import (
    EngineBeat,
    EngineEnds,
    HostBeat,
    HostJoins,
    HostProbed,
    HostRefused,
    ProbeDevices,
    SignalWorker,
    StartWorker,
    ToHost,
    WorkerEnded,
)
from anychip.process_specs import WorkerLink, WorkerSpec

VERSIONS = {"anychip": "1.0", "anychip-fake": "1.0", "torch": "2.9"}
KEY = ClusterKey.new()
REMEDY = "run anychip join"


class Agent:
    """Speaks when the test says so."""

    def __init__(self, context: zmq.Context, address: str, name: str, instance: str = "1") -> None:
        self.who = {"name": name, "instance": instance}
        self.session = ""
        self.socket = context.socket(zmq.DEALER)
        KEY.use(self.socket)
        self.socket.connect(address)

    def say(self, kind, **fields) -> None:
        self.socket.send(msgspec.msgpack.encode(kind(**self.who, session=self.session, **fields)))

    def hear(self, kind, within_s: float = 5.0):
        """The next message of a kind."""
        deadline = time.monotonic() + within_s
        while self.socket.poll(max(0.0, deadline - time.monotonic()) * 1000):
            message = msgspec.msgpack.decode(self.socket.recv(), type=ToHost)
            if isinstance(message, kind):
                return message
        raise AssertionError(f"no {kind.__name__} came")

    def answer(self, **probed) -> None:
        """To the question for devices."""
        self.session = self.hear(ProbeDevices).session
        self.say(HostProbed, **{"machine": "m", "probe": {"devices": []}, "problem": ""} | probed)


@pytest.fixture
def opened():
    """Opens the engine's side for hosts a and b, and agents."""
    context = zmq.Context()
    context.setsockopt(zmq.LINGER, 0)
    with contextlib.ExitStack() as stack:
        stack.callback(context.destroy, linger=0)

        def make(names=("a", "b"), lost=lambda: "") -> tuple[Hosts, object]:
            keyed = KeyedContext("127.0.0.1")
            hosts = Hosts(keyed, KEY, names, None, "anychip-fake", lost)
            stack.callback(keyed.close)
            stack.callback(hosts.close)
            return hosts, lambda name, **more: Agent(context, hosts.address, name, **more)

        yield make


def await_all(hosts: Hosts, limit_s: float = 5.0) -> list[str]:
    heard: list[str] = []
    hosts.await_all(limit_s, heard.append, REMEDY)
    return heard


def both(hosts, agent) -> list[Agent]:
    """a and b, which have joined and said what they have."""
    agents = [agent("a"), agent("b")]
    for each in agents:
        each.say(HostJoins, versions=VERSIONS)
    await_all(hosts)
    hosts._device = "fake"  # the question is asked again when they join again
    for each in agents:
        each.say(HostJoins, versions=VERSIONS)
        each.answer()
    hosts.probe("fake", 5.0, lambda doing: None)
    return agents


def spec(rank: int) -> WorkerSpec:
    return WorkerSpec(
        config=EngineConfig(),
        device="fake",
        device_indexes=(0,),
        rank=rank,
        world_size=2,
        store="",
        folder="",
        probe={},
        link=WorkerLink("x", "y"),
    )


def test_hosts_join_and_say_what_they_have(opened):
    hosts, agent = opened()
    both(hosts, agent)
    assert set(hosts.joined) == {"a", "b"} and hosts.joined["a"].versions == VERSIONS
    hosts.check()


def test_a_host_that_never_joins_is_named_with_the_time_and_the_remedy(opened):
    hosts, agent = opened()
    only = agent("a")
    only.say(HostJoins, versions=VERSIONS)
    while "a" not in hosts.joined:
        time.sleep(0.01)
    with pytest.raises(DeviceUnavailable, match=r"waited \d+ s for host b to join, 1 s may pass; run anychip join"):
        await_all(hosts, limit_s=1.0)


def test_the_start_says_whom_it_waits_for(opened):
    hosts, agent = opened()
    heard: list[str] = []
    agents = [agent("a"), agent("b")]
    agents[0].say(HostJoins, versions=VERSIONS)

    def got_on(doing: str) -> None:
        heard.append(doing)
        if doing.endswith("host b to join"):
            agents[1].say(HostJoins, versions=VERSIONS)

    hosts.await_all(10.0, got_on, REMEDY)
    assert heard[-1] == "the wait for host b to join"


@pytest.mark.parametrize("package", ["anychip", "anychip-fake", "torch"])
def test_another_version_is_refused_by_name(opened, package):
    hosts, agent = opened()
    first, second = agent("a"), agent("b")
    first.say(HostJoins, versions=VERSIONS)
    while "a" not in hosts.joined:
        time.sleep(0.01)
    second.say(HostJoins, versions=VERSIONS | {package: "0.9"})
    said = f"host b has {package} 0.9, host a has {VERSIONS[package]}; install the same on all"
    assert second.hear(HostRefused) == HostRefused(said, final=True)
    with pytest.raises(ConfigError, match=said):
        await_all(hosts)


def test_a_plugin_that_one_host_does_not_have_is_named(opened):
    hosts, agent = opened()
    first, second = agent("a"), agent("b")
    first.say(HostJoins, versions=VERSIONS)
    while "a" not in hosts.joined:
        time.sleep(0.01)
    second.say(HostJoins, versions={name: VERSIONS[name] for name in ("anychip", "torch")})
    assert "host b has anychip-fake none, host a has 1.0" in second.hear(HostRefused).reason


def test_plugins_of_other_devices_need_not_be_everywhere(opened):
    hosts, agent = opened()
    agents = [agent("a"), agent("b")]
    agents[0].say(HostJoins, versions=VERSIONS | {"anychip-other": "1.0"})
    agents[1].say(HostJoins, versions=VERSIONS)
    await_all(hosts)


def test_who_is_not_expected_and_who_has_a_taken_name_are_refused_and_nobody_else_minds(opened):
    hosts, agent = opened()
    both(hosts, agent)
    stranger, double = agent("c"), agent("b", instance="2")
    stranger.say(HostJoins, versions=VERSIONS)
    double.say(HostJoins, versions=VERSIONS)
    assert stranger.hear(HostRefused) == HostRefused("host 'c' is not expected; the engine waits for a, b", final=True)
    assert double.hear(HostRefused) == HostRefused("host 'b' has joined already", final=False)
    hosts.check()


def test_a_device_that_cannot_start_somewhere_is_named_with_its_host(opened):
    hosts, agent = opened(names=("a",))
    only = agent("a")
    only.say(HostJoins, versions=VERSIONS)
    await_all(hosts)
    hosts._device = "fake"
    only.say(HostJoins, versions=VERSIONS)
    only.answer(problem="no driver; install one")
    with pytest.raises(DeviceUnavailable, match="host a: device 'fake' cannot start: no driver; install one"):
        hosts.probe("fake", 5.0, lambda doing: None)


def test_a_workers_end_is_known_by_its_rank(opened):
    hosts, agent = opened()
    _, second = both(hosts, agent)
    worker = hosts.start("b", spec(1), place=0, num_places=1)
    started = second.hear(StartWorker)
    assert (started.spec.rank, started.spec.link) == (1, WorkerLink("x", "y"))
    assert worker.exit_code() is None and worker.pid == 0
    worker.show_stack()
    assert second.hear(SignalWorker).signal == "stacks"
    second.say(WorkerEnded, rank=1, code=-9)
    deadline = time.monotonic() + 5
    while worker.exit_code() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker.exit_code() == -9


def test_a_worker_that_does_not_end_by_itself_is_killed(opened, monkeypatch):
    hosts, agent = opened()
    monkeypatch.setattr(control, "_KILL_S", 0.2)
    _, second = both(hosts, agent)
    hosts.start("b", spec(1), place=0, num_places=1).stop(0.1)
    assert second.hear(SignalWorker).signal == "kill"


def test_a_host_that_is_not_heard_any_more_ends_the_engine_with_its_name(opened, monkeypatch):
    monkeypatch.setattr(control, "SILENT_S", 1.0)
    hosts, agent = opened()
    first, _ = both(hosts, agent)
    worker = hosts.start("b", spec(1), place=0, num_places=1)
    deadline = time.monotonic() + 10
    with pytest.raises(EngineDead, match="host b is gone: it has not been heard for 1 s"):
        while time.monotonic() < deadline:
            first.say(HostBeat)
            worker.exit_code()
            time.sleep(0.1)
    worker.stop(1.0)  # does not wait for whom nobody can ask


def test_what_the_launcher_knows_of_a_loss_ends_the_engine(opened):
    cause: list[str] = []
    hosts, agent = opened(lost=lambda: cause[0] if cause else "")
    both(hosts, agent)
    cause.append("the agent of a on Ray is gone")
    deadline = time.monotonic() + 10
    with pytest.raises(EngineDead, match="the agent of a on Ray is gone"):
        while time.monotonic() < deadline:
            hosts.check()
            time.sleep(0.05)


def test_an_agent_of_the_engine_before_is_told_that_it_has_ended(opened):
    hosts, agent = opened()
    both(hosts, agent)
    old = agent("a", instance="old")
    old.session = "the one before"
    old.say(HostBeat)
    assert old.hear(EngineEnds).session == "the one before"


def test_hosts_hear_that_the_engine_lives_and_that_it_ends(opened):
    hosts, agent = opened()
    first, second = both(hosts, agent)
    assert first.hear(EngineBeat).session == first.session
    hosts.close()
    assert first.hear(EngineEnds).session == second.hear(EngineEnds).session == first.session


def test_ranks_meet_by_values_that_they_set():
    meeting = Meeting()

    def ask(operation: str, name: str, value: bytes = b"") -> bytes | None:
        return msgspec.msgpack.decode(meeting.answer(msgspec.msgpack.encode((operation, name, value))))

    assert ask("get", "x") is None
    assert ask("set", "x", b"\x00\xff") == b"\x00\xff" == ask("get", "x")
    assert (ask("add", "n", b"2"), ask("add", "n", b"3")) == (b"2", b"5")
    assert ask("delete", "x") == b"\x00\xff" and ask("delete", "x") is None
    with pytest.raises(ValueError, match="operation 'eval'"):
        ask("eval", "x")


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({}, "nodes takes a cluster_key"),
        ({"cluster_key": "k", "tensor_parallel_size": 3}, "which 2 nodes cannot share evenly; give 2 or 4"),
        ({"cluster_key": "k", "tensor_parallel_size": 1}, "cannot share evenly; give 2$"),
        ({"cluster_key": "k", "executor": "ray", "tensor_parallel_size": 2}, "executor ray has no use for nodes"),
        ({"cluster_key": "k", "nodes": ("a", "a"), "tensor_parallel_size": 2}, "expected names that differ"),
    ],
)
def test_configurations_that_hosts_cannot_share_are_refused(settings, cause):
    with pytest.raises(ConfigError, match=cause):
        EngineConfig(**{"nodes": ("a", "b")} | settings)


def test_a_command_line_with_nodes_makes_the_configuration_that_it_was_made_from():
    config = EngineConfig(
        model="quickstart", device="cpu", nodes=("a", "b"), cluster_key="k", node_port=1234, tensor_parallel_size=2
    )
    parser = argparse.ArgumentParser()
    add_engine_options(parser, Environment())
    assert engine_config(parser.parse_args(engine_arguments(config))) == config
