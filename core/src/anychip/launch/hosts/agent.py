"""On each host: joins the engine, starts the workers that it asks for, says when they end. When the engine is gone,
so are they."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq

from anychip.environment import Environment
from anychip.errors import AnychipError, ConfigError
from anychip.keyed_sockets import ClusterKey
from anychip.launch.child import Child, end_with_parent, read_spec, show_stacks_when_asked
from anychip.launch.hosts.interfaces import interface_of, own_address
from anychip.launch.hosts.messages import (
    EVERY_S,
    SILENT_S,
    AgentSpec,
    EngineEnds,
    FromHost,
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
from anychip.observability.logs import configure_logging
from anychip.plugin_api.manifest import Placement
from anychip.process_specs import WorkerSpec
from anychip.registry.blame import calling
from anychip.registry.devices import candidate
from anychip.registry.plugins import Plugins, load_plugins

log = logging.getLogger("anychip.hosts")

_POLL_MS = 200
_END_S = 3.0
"""What workers have to follow their engine in."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


_Message = TypeVar("_Message", HostJoins, HostProbed, HostBeat, WorkerEnded)


class HostAgent:
    """`address` is the engine's, as tcp://host:port; `name` is this host's, as the engine knows it. Workers find the
    key of their engine in `folder`, which is private."""

    def __init__(self, address: str, key: ClusterKey, name: str, folder: str) -> None:
        self._address = address
        self._key = key
        self._name = name
        self._folder = folder
        self._instance = secrets.token_hex(8)
        self._plugins = load_plugins()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToHost] = msgspec.msgpack.Decoder(ToHost)
        self._stopping = threading.Event()

    def run(self) -> None:
        """Serves one engine after another, until `stop`. Raises ConfigError when one refuses this host."""
        while not self._stopping.is_set():
            self.run_once()

    def run_once(self) -> None:
        """Serves one engine, until it ends."""
        session = _Session(self)
        try:
            session.run()
        finally:
            session.close()

    def stop(self) -> None:
        """From another thread."""
        self._stopping.set()


class _Session:
    """With one engine, from joining it to the end of its workers."""

    def __init__(self, agent: HostAgent) -> None:
        self._agent = agent
        self._id = ""
        self._refused = ""
        self._children: dict[int, Child] = {}  # by rank
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is kept for an engine that is not there yet
        self._socket.setsockopt(zmq.LINGER, 500)
        agent._key.use(self._socket)
        self._socket.connect(agent._address)

    def run(self) -> None:
        """Until the engine ends, or has not been heard for too long."""
        said_at, heard_at = 0.0, time.monotonic()
        while not self._agent._stopping.is_set():
            if self._socket.poll(_POLL_MS):
                heard_at = time.monotonic()
                message = self._agent._decoder.decode(self._socket.recv())
                if isinstance(message, EngineEnds):
                    if message.session in ("", self._id):
                        return
                else:
                    self._take(message)
            self._tell_ends()
            now = time.monotonic()
            if self._id and now - heard_at > SILENT_S:
                log.error("the engine has not been heard for %.0f s: its workers are ended", now - heard_at)
                return
            if now - said_at >= EVERY_S:
                said_at = now
                self._say_that_it_lives()

    def close(self) -> None:
        deadline = time.monotonic() + _END_S
        for child in self._children.values():
            child.stop(max(0.0, deadline - time.monotonic()))
        self._context.destroy(linger=500)

    def _take(self, message: ToHost) -> None:
        if isinstance(message, HostRefused):
            if message.final:
                raise ConfigError(f"the engine refuses this host: {message.reason}")
            if message.reason != self._refused:
                self._refused = message.reason
                log.warning("waiting: %s", message.reason)
        if isinstance(message, ProbeDevices):
            self._id = message.session
            Path(self._agent._folder, "key").write_text(self._agent._key.of_session(message.session).text)
            log.info("host %s has joined the engine", self._agent._name)
            self._send(self._probed(message.device))
        elif isinstance(message, StartWorker):
            self._start(message)
        elif isinstance(message, SignalWorker) and (child := self._children.get(message.rank)) is not None:
            (child.show_stack if message.signal == "stacks" else child.kill)()

    def _probed(self, device: str) -> HostProbed:
        manifest = self._agent._plugins.platforms.get(device)
        if manifest is None:
            known = ", ".join(sorted(self._agent._plugins.platforms)) or "none"
            return self._probed_as({}, f"no plugin brings it; installed are {known}")
        found = candidate(manifest)
        remedy = f"; {found.remedy}" if found.remedy else ""
        problem = "; ".join(found.problems) + remedy if found.problems else ""
        return self._probed_as(msgspec.to_builtins(found.probe), problem)

    def _probed_as(self, probe: dict[str, object], problem: str) -> HostProbed:
        with contextlib.suppress(OSError):
            machine = _BOOT_ID.read_text().strip()
            machine += str(os.stat("/proc/self/ns/net").st_ino)  # containers of one machine have cores of their own
            return self._named(HostProbed, machine=machine, probe=probe, problem=problem)
        return self._named(HostProbed, machine=self._agent._name, probe=probe, problem=problem)

    def _start(self, message: StartWorker) -> None:
        spec = _with_key(message.spec, self._agent._folder)
        manifest = self._agent._plugins.platforms[spec.device]
        with calling(manifest.package, "PlatformManifest.worker_env"):
            placement = Placement(rank=message.place, world_size=message.num_places, device_indexes=spec.device_indexes)
            environment = dict(manifest.worker_env(spec.config, placement))
        interface = interface_of(own_address(self._agent._address))
        # Gloo would take what the host's name resolves to.
        unset = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}
        self._children[spec.rank] = Child("anychip.launch.worker_main", spec, environment, unset)

    def _tell_ends(self) -> None:
        for rank, child in tuple(self._children.items()):
            if (code := child.exit_code()) is not None:
                del self._children[rank]
                self._send(self._named(WorkerEnded, rank=rank, code=code))

    def _say_that_it_lives(self) -> None:
        if self._id:
            self._send(self._named(HostBeat))
        else:
            self._send(self._named(HostJoins, versions=installed_versions(self._agent._plugins)))

    def _named(self, kind: type[_Message], **fields: object) -> _Message:
        who = {"name": self._agent._name, "instance": self._agent._instance, "session": self._id}
        return kind(**who, **fields)  # type: ignore[arg-type]

    def _send(self, message: FromHost) -> None:
        with contextlib.suppress(zmq.Again):  # the engine is not there; what it must know is said again
            self._socket.send(self._agent._encoder.encode(message), zmq.NOBLOCK)


def installed_versions(plugins: Plugins) -> dict[str, str]:
    """Of what must be the same on all hosts: anychip, its plugins and the runtime of their collectives."""
    found: dict[str, str] = {}
    for package in {manifest.package for manifest in plugins.platforms.values()} | {"anychip", "torch"}:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _with_key(spec: WorkerSpec, folder: str) -> WorkerSpec:
    """The spec with this host's folder and key file in place of the engine's."""
    assert spec.link is not None, "an engine that asks for a worker has bound its sockets"
    key = f"{folder}/key"
    link = msgspec.structs.replace(spec.link, key_file=key)
    return msgspec.structs.replace(spec, folder=folder, link=link, store=f"{spec.store}?{key}")


def main(spec: AgentSpec) -> int:
    """The exit status."""
    try:
        HostAgent(spec.address, ClusterKey(spec.key), spec.name, spec.folder).run()
    except AnychipError as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    show_stacks_when_asked()
    configure_logging(Environment.read(child=True))
    agent_spec = msgspec.json.decode(read_spec(), type=AgentSpec)
    end_with_parent(agent_spec.folder)
    sys.exit(main(agent_spec))
