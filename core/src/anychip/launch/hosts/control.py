"""The engine's side of its hosts: who has joined, what each can do, whether it lives. Decides nothing about ranks."""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import zmq

from anychip.errors import AnychipError, ConfigError, DeviceUnavailable, EngineDead
from anychip.keyed_sockets import ClusterKey, KeyedContext
from anychip.launch.hosts.meeting import Meeting
from anychip.launch.hosts.messages import (
    EVERY_S,
    SILENT_S,
    EngineBeat,
    EngineEnds,
    FromHost,
    HostJoins,
    HostProbed,
    HostRefused,
    ProbeDevices,
    Signal,
    SignalWorker,
    StartWorker,
    ToHost,
    WorkerEnded,
)
from anychip.process_specs import WorkerSpec

log = logging.getLogger("anychip.engine")

_POLL_MS = 50
_KILL_S = 5.0


@dataclass(slots=True)
class Host:
    """A host that has joined. Another thread than its reader writes it, a field at a time."""

    identity: bytes
    instance: str
    versions: Mapping[str, str]
    heard_at: float = field(default_factory=time.monotonic)
    probed: HostProbed | None = None


class Hosts:
    """Lets hosts of the given names join at once. Packages that two of them have must be of one version, and all must
    have `package`, the device's plugin. `lost` is asked every second whether one is known to be gone: the cause, or "".
    A thread of its own owns the sockets."""

    def __init__(
        self,
        context: KeyedContext,
        key: ClusterKey,
        names: Sequence[str],
        port: int | None,
        package: str,
        lost: Callable[[], str] = lambda: "",
    ) -> None:
        self.names = tuple(names)
        self.joined: dict[str, Host] = {}
        self._package = package
        self._session = secrets.token_hex(8)
        self.key = key.of_session(self._session)
        self._lost = lost
        self._meeting = Meeting()
        self._device: str | None = None
        self._problem: AnychipError | None = None
        self._ended: dict[int, int] = {}  # by rank: the exit status
        self._host_of: dict[int, str] = {}
        self._to_send: queue.SimpleQueue[tuple[bytes, ToHost]] = queue.SimpleQueue()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromHost] = msgspec.msgpack.Decoder(FromHost)
        self._control, self.address = context.bind(zmq.ROUTER, key, port)
        self._store, self.store = context.bind(zmq.ROUTER, self.key)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hosts", daemon=True)
        self._thread.start()

    # -- the engine's thread ------------------------------------------------------------------------------

    def await_all(self, limit_s: float, got_on: Callable[[str], None], remedy: str) -> None:
        """Until all hosts are there. Raises DeviceUnavailable that names the missing ones, and ConfigError for versions
        that differ."""
        self._await(
            lambda: [name for name in self.names if name not in self.joined], limit_s, got_on, "to join", remedy
        )

    def probe(self, device: str, limit_s: float, got_on: Callable[[str], None]) -> dict[str, HostProbed]:
        """What each host's probe says of a device. Raises DeviceUnavailable where one cannot run it."""
        self._device = device
        for host in self.joined.values():
            self._to_send.put((host.identity, ProbeDevices(self._session, device)))

        def missing() -> list[str]:
            return [name for name in self.names if self.joined[name].probed is None]

        self._await(missing, limit_s, got_on, f"to look for {device} devices", "its log says more")
        found = {name: probed for name in self.names if (probed := self.joined[name].probed) is not None}
        for name, probed in found.items():
            if probed.problem:
                raise DeviceUnavailable(f"host {name}: device {device!r} cannot start: {probed.problem}")
        return found

    def _await(
        self, missing: Callable[[], list[str]], limit_s: float, got_on: Callable[[str], None], what: str, remedy: str
    ) -> None:
        began, known = time.monotonic(), self.names + ("",)
        while names := missing():
            self.check()
            if len(names) < len(known):
                known = tuple(names)
                got_on(f"the wait for host {', '.join(names)} {what}")
            if (waited := time.monotonic() - began) > limit_s:
                raise DeviceUnavailable(
                    f"waited {waited:.0f} s for host {', '.join(names)} {what}, {limit_s:.0f} s may pass; {remedy}"
                )
            time.sleep(_POLL_MS / 1000)

    def start(self, name: str, spec: WorkerSpec, *, place: int, num_places: int) -> RemoteWorker:
        """Starts the worker of a rank on a host."""
        self._host_of[spec.rank] = name
        self._to_send.put((self.joined[name].identity, StartWorker(self._session, spec, place, num_places)))
        return RemoteWorker(self, spec.rank)

    def signal(self, rank: int, signal: Signal) -> None:
        self._to_send.put((self.joined[self._host_of[rank]].identity, SignalWorker(self._session, rank, signal)))

    def exit_code(self, rank: int) -> int | None:
        """None while the worker runs. Raises EngineDead when its host is gone."""
        code = self._ended.get(rank)
        if code is None:
            self.check()
        return code

    def check(self) -> None:
        """Raises what has gone wrong with the hosts."""
        if self._problem is not None:
            raise self._problem

    def close(self) -> None:
        """Tells the hosts to end what they run for this engine."""
        self._closing.set()
        self._thread.join(timeout=_KILL_S)

    # -- the sockets' thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._control, zmq.POLLIN)
        poller.register(self._store, zmq.POLLIN)
        beat_at = 0.0
        while not self._closing.is_set():
            ready = dict(poller.poll(_POLL_MS))
            try:
                if self._control in ready:
                    identity, frame = self._control.recv_multipart()
                    self._take(identity, self._decoder.decode(frame))
                if self._store in ready:
                    identity, _, frame = self._store.recv_multipart()
                    self._store.send_multipart([identity, b"", self._meeting.answer(frame)])
            except (msgspec.MsgspecError, ValueError) as error:  # of a peer with the key, and another version
                log.error("a message of a host cannot be read: %s", error)
            self._send_waiting()
            if (now := time.monotonic()) - beat_at >= EVERY_S:
                beat_at = now
                self._beat(now)
        for host in self.joined.values():
            self._send(host.identity, EngineEnds(self._session))
        for socket in (self._control, self._store):
            socket.close(linger=500)

    def _beat(self, now: float) -> None:
        for name, host in self.joined.items():
            self._send(host.identity, EngineBeat(self._session))
            if now - host.heard_at > SILENT_S and self._problem is None:
                self._problem = EngineDead(f"host {name} is gone: it has not been heard for {SILENT_S:.0f} s")
        if self._problem is None and (cause := self._lost()):
            self._problem = EngineDead(cause)

    def _take(self, identity: bytes, message: FromHost) -> None:
        if isinstance(message, HostJoins):
            self._take_joins(identity, message)
            return
        host = self.joined.get(message.name)
        if message.session != self._session or host is None or host.instance != message.instance:
            self._send(identity, EngineEnds(message.session))
            return
        host.heard_at, host.identity = time.monotonic(), identity
        if isinstance(message, HostProbed):
            host.probed = message
        elif isinstance(message, WorkerEnded):
            self._ended[message.rank] = message.code

    def _take_joins(self, identity: bytes, message: HostJoins) -> None:
        present = self.joined.get(message.name)
        if present is not None and present.instance == message.instance:
            present.heard_at, present.identity = time.monotonic(), identity
            if self._device is not None:  # the question was lost with a connection
                self._send(identity, ProbeDevices(self._session, self._device))
            return
        reason = ""
        if message.name not in self.names:
            reason = f"host {message.name!r} is not expected; the engine waits for {', '.join(self.names)}"
        elif present is not None:
            reason = f"host {message.name!r} has joined already"
        elif difference := self._other_version(message):
            reason = difference
            self._problem = self._problem or ConfigError(difference)
        if reason:
            # Who has the name may be gone without having said so.
            self._send(identity, HostRefused(reason, final=present is None))
            return
        log.info("host %s has joined", message.name)
        self.joined[message.name] = Host(identity, message.instance, message.versions)

    def _other_version(self, message: HostJoins) -> str:
        """What differs from the first host that joined; "": nothing."""
        for name, host in self.joined.items():
            shared = host.versions.keys() & message.versions.keys()
            for package in sorted(shared | {self._package}):
                there, here = host.versions.get(package, "none"), message.versions.get(package, "none")
                if there != here:
                    return f"host {message.name} has {package} {here}, host {name} has {there}; install the same on all"
            return ""
        return ""

    def _send_waiting(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._send(*self._to_send.get_nowait())

    def _send(self, identity: bytes, message: ToHost) -> None:
        self._control.send_multipart([identity, self._encoder.encode(message)])


class RemoteWorker:
    """executor.ChildProcess of a worker on another host."""

    pid = 0

    def __init__(self, hosts: Hosts, rank: int) -> None:
        self._hosts = hosts
        self._rank = rank

    def exit_code(self) -> int | None:
        return self._hosts.exit_code(self._rank)

    def show_stack(self) -> None:
        self._hosts.signal(self._rank, "stacks")

    def kill(self) -> None:
        self._hosts.signal(self._rank, "kill")

    def stop(self, deadline_s: float) -> None:
        """Waits for it to end by itself, then ends it. A host that is gone does so without being told."""
        with contextlib.suppress(AnychipError):
            if not self._ends_within(deadline_s):
                self.kill()
                if not self._ends_within(_KILL_S):
                    log.error("worker %d does not end; it holds what it held", self._rank)

    def _ends_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.exit_code() is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_MS / 1000)
        return True
