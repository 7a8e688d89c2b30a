"""What the engine and the agents of hosts say to each other: msgspec structs, encoded as MessagePack.

Agent -> engine: HostJoins, HostProbed, HostBeat, WorkerEnded.
Engine -> agent: HostRefused, ProbeDevices, StartWorker, SignalWorker, EngineBeat, EngineEnds.

An agent's messages name the engine's session, so that a new engine knows what was meant for the one before.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from anychip.process_specs import WorkerSpec

EVERY_S = 1.0
"""Between two beats, each way."""

SILENT_S = 15.0
"""Without a beat for so long, the other side counts as gone."""

Signal = Literal["stacks", "kill"]


class _Named(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    """The host's, as the engine knows it."""
    instance: str
    """Of the agent's process: two may claim one name."""
    session: str = ""
    """The engine's; "" before it has answered."""


class HostJoins(_Named, frozen=True, tag=True, kw_only=True):
    versions: dict[str, str]
    """By package."""


class HostProbed(_Named, frozen=True, tag=True, kw_only=True):
    machine: str
    """The same for agents on the same machine."""
    probe: dict[str, Any]
    """A ProbeResult as plain values."""
    problem: str
    """Why the device cannot run here; "": it can."""


class HostBeat(_Named, frozen=True, tag=True, kw_only=True):
    pass


class WorkerEnded(_Named, frozen=True, tag=True, kw_only=True):
    rank: int
    code: int


class HostRefused(msgspec.Struct, frozen=True, tag=True):
    reason: str
    final: bool
    """Whether asking again is of no use."""


class ProbeDevices(msgspec.Struct, frozen=True, tag=True):
    session: str
    device: str


class StartWorker(msgspec.Struct, frozen=True, tag=True):
    """`place` counts the workers of one machine, of which there are `num_places`."""

    session: str
    spec: WorkerSpec
    place: int
    num_places: int


class SignalWorker(msgspec.Struct, frozen=True, tag=True):
    session: str
    rank: int
    signal: Signal


class EngineBeat(msgspec.Struct, frozen=True, tag=True):
    session: str


class EngineEnds(msgspec.Struct, frozen=True, tag=True):
    session: str


FromHost = HostJoins | HostProbed | HostBeat | WorkerEnded
ToHost = HostRefused | ProbeDevices | StartWorker | SignalWorker | EngineBeat | EngineEnds


class AgentSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent that an engine starts on its own host is told."""

    address: str
    name: str
    key: str
    folder: str
