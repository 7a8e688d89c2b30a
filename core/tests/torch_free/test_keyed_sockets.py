"""Sockets between hosts: who has no key neither joins nor reads."""

from __future__ import annotations

import socket
import threading

import pytest
import zmq

from anychip.errors import ConfigError
from anychip.keyed_sockets import ClusterKey, KeyedContext

SECRET = "a prompt that nobody else may read"
SHORT_MS = 700


@pytest.fixture
def engine():
    context = KeyedContext("127.0.0.1")
    yield context
    context.close()


@pytest.fixture
def clients():
    context = zmq.Context()
    context.setsockopt(zmq.LINGER, 0)  # of every socket: what never came through is not waited for
    yield context
    context.destroy(linger=0)


def connected(clients, kind: int, endpoint: str, key: ClusterKey | None) -> zmq.Socket:
    made = clients.socket(kind)
    if key is not None:
        key.use(made)
    made.connect(endpoint)
    return made


def half_keyed(clients, kind: int, endpoint: str, key: ClusterKey) -> zmq.Socket:
    """Knows the engine's public key, and has a key pair of its own."""
    made = clients.socket(kind)
    made.curve_serverkey = key._engine[0]
    made.curve_publickey, made.curve_secretkey = zmq.curve_keypair()
    made.connect(endpoint)
    return made


def test_both_sides_need_no_more_than_the_same_key(engine, clients):
    key = ClusterKey.new()
    bound, endpoint = engine.bind(zmq.PULL, key)
    worker = connected(clients, zmq.PUSH, endpoint, ClusterKey(key.text))
    worker.send(b"here")
    assert bound.poll(5000) and bound.recv() == b"here"


@pytest.mark.parametrize("who", ["no key", "another key", "the key of another life", "the engine's public key alone"])
def test_nobody_else_is_let_in(engine, clients, who):
    key = ClusterKey.new()
    bound, endpoint = engine.bind(zmq.PULL, key.of_session("one"))
    to_workers, steps = engine.bind(zmq.PUSH, key.of_session("one"))
    keys = {"another key": ClusterKey.new(), "the key of another life": key.of_session("two")}
    if who == "the engine's public key alone":
        sends = half_keyed(clients, zmq.PUSH, endpoint, key.of_session("one"))
        reads = half_keyed(clients, zmq.PULL, steps, key.of_session("one"))
    else:
        sends = connected(clients, zmq.PUSH, endpoint, keys.get(who))
        reads = connected(clients, zmq.PULL, steps, keys.get(who))
    sends.send(b"intruder")
    assert not bound.poll(SHORT_MS), "a stranger's message came through"
    assert not to_workers.poll(0, zmq.POLLOUT), "a stranger counts as a worker"
    with pytest.raises(zmq.Again):
        to_workers.send(SECRET.encode(), zmq.NOBLOCK)
    assert not reads.poll(0)
    worker = connected(clients, zmq.PUSH, endpoint, key.of_session("one"))
    worker.send(b"worker")
    assert bound.poll(5000) and bound.recv() == b"worker"


def test_what_passes_on_the_wire_cannot_be_read(engine, clients):
    key = ClusterKey.new()
    bound, endpoint = engine.bind(zmq.PULL, key)
    seen, place = recording_relay(endpoint)
    worker = connected(clients, zmq.PUSH, place, key)
    worker.send(SECRET.encode())
    assert bound.poll(5000) and bound.recv() == SECRET.encode()
    wire = b"".join(seen)
    assert len(wire) > 200 and SECRET.encode() not in wire and key.text.encode() not in wire


def recording_relay(endpoint: str) -> tuple[list[bytes], str]:
    """Somebody between the hosts, who writes down all that passes."""
    seen: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                seen.append(data)
                target.sendall(data)
        except OSError:  # the test has ended
            pass

    def run() -> None:
        client, _ = listener.accept()
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        server = socket.create_connection((host, int(port)))
        threading.Thread(target=pump, args=(client, server), daemon=True).start()
        pump(server, client)

    threading.Thread(target=run, daemon=True).start()
    return seen, f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def test_a_key_that_could_be_guessed_or_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read from .*; make one with `openssl rand -hex 32`"):
        ClusterKey.of_file(str(tmp_path / "none"))
    (tmp_path / "short").write_text("hunter2\n")
    with pytest.raises(ConfigError, match="has 7 characters, 32 are needed"):
        ClusterKey.of_file(str(tmp_path / "short"))
    (tmp_path / "good").write_text("a" * 64 + "\n")
    assert ClusterKey.of_file(str(tmp_path / "good")).text == "a" * 64


def test_a_port_that_is_taken_is_named(engine):
    key = ClusterKey.new()
    _, endpoint = engine.bind(zmq.PULL, key)
    port = int(endpoint.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"cannot listen on tcp://127.0.0.1:{port}: .*a free port"):
        engine.bind(zmq.PULL, key, port)
