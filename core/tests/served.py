"""A server in a process of its own, for the tests that are its clients."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

READY_S = 60
CHAT = {"messages": [{"role": "user", "content": "How do I reverse a list?"}], "max_tokens": 8, "temperature": 0}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


class Server:
    """Of the embedded model where `options` do not begin with another. `wait` False returns while the server is still
    starting. Its log is a file, which cannot fill up as a pipe."""

    def __init__(self, *options: str, wait: bool = True) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        if not options or options[0].startswith("-"):
            options = ("quickstart", *options)
        command = [sys.executable, "-m", "anychip.entrypoints.cli.main", "serve", "--port", str(self.port), *options]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the server runs
        self.process = subprocess.Popen(command, stderr=self._log, text=True)
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)
        for _ in range(READY_S * 20 if wait else 0):
            assert self.process.poll() is None, self.log()
            try:
                self.client.get("/health")
                return
            except httpx.TransportError:
                time.sleep(0.05)
        assert not wait, "the server did not start"

    def log(self) -> str:
        """What it has written to stderr so far."""
        self._log.seek(0)
        return self._log.read()

    def engine_pids(self) -> list[int]:
        """Living engines; the child that checks grammars is none."""
        pids = children(self.process.pid)
        return [pid for pid in pids if b"engine_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def engine_pid(self) -> int:
        found = self.engine_pids()
        assert len(found) == 1, f"one engine process is expected, found {found}"
        return found[0]

    def wait_until_ready(self) -> None:
        for _ in range(READY_S * 10):
            if self.client.get("/ready").status_code == 200:
                return
            time.sleep(0.1)
        raise AssertionError("the server did not become ready")

    def post(self, path: str, body: object, **more: object) -> httpx.Response:
        return self.client.post(path, content=body if isinstance(body, str) else json.dumps(body), **more)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        found = [line for line in self.client.get("/metrics").text.splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in found if line[len(name)] in " {")

    def stop(self) -> int:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(30)
        assert "Traceback" not in self.log(), self.log()
        return status


def events(response: httpx.Response) -> list[dict]:
    """A finished stream's chunks."""
    return chunks_of(response.text)


def chunks_of(text: str) -> list[dict]:
    """Of a stream's whole text."""
    lines = [line.strip().removeprefix("data: ") for line in text.split("\n\n") if line.strip()]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
