"""Throughput and latency of an engine in this process, and how fast it starts."""

from __future__ import annotations

import http.client
import itertools
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anychip.bench.report import percentiles
from anychip.bench.trace import traced
from anychip.bench.workload import Workload
from anychip.config import EngineConfig
from anychip.errors import EngineDead
from anychip.launch.llm import LLM
from anychip.model_config import load_model_config
from anychip.sampling_params import SamplingParams

Advance = Callable[[int], None]
"""Told how much of the work is done."""


def throughput(config: EngineConfig, workload: Workload, advance: Advance, profile: Path | None) -> dict[str, Any]:
    """All requests at once; tokens per second from the first step to the last."""
    with LLM.from_config(config) as llm:
        requests = workload.requests(load_model_config(llm.config.model).vocab_size)
        warm_up(llm)
        prompts, params = [r[0] for r in requests], [r[1] for r in requests]
        with traced(llm, profile) as device:
            began, first, done = time.perf_counter(), 0.0, 0
            for output in llm.stream_batch(prompts, params):
                first = first or time.perf_counter() - began
                if output.finished:
                    done += 1
                    advance(done)
            seconds = time.perf_counter() - began
    read, written = sum(map(len, prompts)), sum(p.max_tokens or 0 for p in params)
    return {
        "seconds": seconds,
        "first_token_s": first,
        "prompt_tokens": read,
        "output_tokens": written,
        "requests_per_s": len(requests) / seconds,
        "output_tokens_per_s": written / seconds,
        "total_tokens_per_s": (read + written) / seconds,
        **device,
    }


def latency(config: EngineConfig, workload: Workload, advance: Advance, profile: Path | None) -> dict[str, Any]:
    """One request at a time: time to the first token, and between tokens."""
    first_token, between, whole = [], [], []
    with LLM.from_config(config) as llm:
        requests = workload.requests(load_model_config(llm.config.model).vocab_size)
        warm_up(llm)
        with traced(llm, profile) as device:
            for number, (prompt, sampling) in enumerate(requests):
                moments = [time.perf_counter()]
                stream = llm.stream(prompt, sampling)
                moments += [time.perf_counter() for output in stream if output.outputs[0].token_ids]
                first_token.append(moments[1] - moments[0])
                between += [b - a for a, b in itertools.pairwise(moments[1:])]
                whole.append(moments[-1] - moments[0])
                advance(number + 1)
    samples = {"first_token_s": first_token, "between_tokens_s": between, "request_s": whole}
    return {**{name: percentiles(values) for name, values in samples.items()}, "samples": samples, **device}


def warm_up(llm: LLM) -> None:
    """One short request that shares nothing with the workload, so that what is done once is not measured."""
    llm.generate([1] * 8, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))


def startup(arguments: Sequence[str], repeats: int, advance: Advance) -> dict[str, Any]:
    """Seconds from `anychip serve` to the first healthy answer, and the processes' memory then."""
    runs = []
    for number in range(repeats):
        runs.append(start_once(arguments))
        advance(number + 1)
    return {name: percentiles([run[name] for run in runs]) for name in runs[0]} | {"runs": runs}


def start_once(arguments: Sequence[str]) -> dict[str, float]:
    """Resident MiB are those of the API process and of the engine's."""
    with ServerProcess(arguments) as server:
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        return {
            "seconds": server.seconds,
            "api_mib": resident_mib(server.pid),
            "engine_mib": resident_mib(int(children[0])),
        }


class ServerProcess:
    """`anychip serve` on a free port, healthy once entered."""

    def __init__(self, arguments: Sequence[str], deadline_s: float = 600.0) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._command = [sys.executable, "-m", "anychip.entrypoints.cli.main", "serve", *arguments]
        self._deadline_s = deadline_s

    def __enter__(self) -> ServerProcess:
        began = time.perf_counter()
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen([*self._command, "--port", str(self.port)], stderr=self._log, text=True)
        self.pid = self._process.pid
        while not self._is_healthy():
            if self._process.poll() is not None:
                self._log.seek(0)
                raise EngineDead(f"the server did not start: {self._log.read().strip()}")
            if time.perf_counter() - began > self._deadline_s:
                self.__exit__()
                raise EngineDead(f"the server was not ready after {self._deadline_s:.0f} s")
            time.sleep(0.01)
        self.seconds = time.perf_counter() - began
        return self

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise EngineDead(f"process {pid} is gone")
