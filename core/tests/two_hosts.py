"""A server over two hosts of this machine: two network namespaces with a link between them, or, without the rights to
make them, two loopback addresses."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from served import READY_S

_CLI = [sys.executable, "-m", "anychip.entrypoints.cli.main"]
PORT = 7345


class Link:
    """`addresses` of the two hosts, and the prefix of a command that runs on one of them."""

    addresses = ("127.0.0.2", "127.0.0.3")

    def on(self, host: int) -> list[str]:
        return []

    def close(self) -> None: ...


class NamespaceLink(Link):
    """Two namespaces and a cable. Raises CalledProcessError without the rights."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        self._names = [f"anychip-{tag}-{host}" for host in range(2)]
        try:
            for name in self._names:
                _ip("netns", "add", name)
            ends = [f"a{tag}{host}" for host in range(2)]
            _ip(
                "link",
                "add",
                ends[0],
                "netns",
                self._names[0],
                "type",
                "veth",
                "peer",
                ends[1],
                "netns",
                self._names[1],
            )
            for name, end, address in zip(self._names, ends, self.addresses, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", end)
                _ip("-n", name, "link", "set", end, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise
        self._ends = ends

    def on(self, host: int) -> list[str]:
        return ["ip", "netns", "exec", self._names[host]]

    def drop(self, *, dropped: bool) -> None:
        """Whether packets are lost."""
        _ip("-n", self._names[1], "link", "set", self._ends[1], "down" if dropped else "up")

    def close(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=True)


def can_make_namespaces() -> bool:
    if os.getuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        NamespaceLink().close()
    except (subprocess.CalledProcessError, OSError):
        return False
    return True


class TwoHosts:
    """The server is on the first host, and its clients reach it by a Unix socket, which no network separates."""

    def __init__(self, link: Link, *options: str, axis: str = "tensor") -> None:
        self.link = link
        self.folder = tempfile.TemporaryDirectory(prefix="two-")
        self.key = Path(self.folder.name, "key")
        self.key.write_text(secrets.token_hex(32))
        self._log = Path(self.folder.name, "log").open("w+")  # noqa: SIM115 - open as long as the hosts run
        uds = f"{self.folder.name}/http"
        nodes = ["--nodes", ",".join(link.addresses), "--node-port", str(PORT), "--cluster-key", str(self.key)]
        serve = [
            *_CLI,
            "serve",
            "quickstart",
            "--device",
            "cpu",
            f"--{axis}-parallel-size=2",
            "--uds",
            uds,
            *nodes,
            *options,
        ]
        self.server = self._run(0, serve)
        self.agent = self.join()
        self.client = httpx.Client(transport=httpx.HTTPTransport(uds=uds), base_url="http://x", timeout=60)

    def join(self, key: Path | None = None) -> subprocess.Popen:
        address = f"{self.link.addresses[0]}:{PORT}"
        name = self.link.addresses[1]
        return self._run(1, [*_CLI, "join", address, "--cluster-key", str(key or self.key), "--as", name])

    def _run(self, host: int, command: list[str]) -> subprocess.Popen:
        return subprocess.Popen([*self.link.on(host), *command], stderr=self._log, stdout=self._log)

    def log(self) -> str:
        return Path(self._log.name).read_text()

    def await_ready(self) -> None:
        deadline = time.monotonic() + 2 * READY_S
        while time.monotonic() < deadline:
            assert self.server.poll() is None, self.log()
            try:
                if self.client.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready\n{self.log()}")

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        """Greedy ones."""
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = self.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    def close(self) -> tuple[int, int]:
        """Exit statuses of the server and of the agent."""
        self.client.close()
        statuses = []
        for process in (self.server, self.agent):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                statuses.append(process.wait(30))
            except subprocess.TimeoutExpired:
                process.kill()
                statuses.append(process.wait(5))
        self._log.close()
        self.folder.cleanup()
        return statuses[0], statuses[1]
