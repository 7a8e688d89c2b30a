"""How long the API process's event loop stands still: while streams run, and while long prompts arrive beside them. The
engine is a fake one; clients are a process of their own. A stall is what the loop was late, and no more than what the
process computed meanwhile: what other programs took of the machine does not count.

python benchmarks/api_stalls.py --output benchmarks/results/serving/api_stalls.json --trace stalls.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from fake_engine import FakeChild

from anychip.bench.report import percentiles, write
from anychip.config import EngineConfig
from anychip.entrypoints.http.app import make_app
from anychip.entrypoints.http.server import steady_interpreter
from anychip.launch import engine_process
from anychip.launch.async_llm import AsyncLLM

TICK_S = 0.001
TOKENS = 100_000
TEXT = "The quick brown fox jumps over the lazy dog and writes a long letter to the other one. "
CHARACTERS_A_TOKEN = 3.0


class Watch:
    """Asks to be woken every millisecond, and notes how late it was."""

    def __init__(self) -> None:
        self.late: list[tuple[float, float]] = []  # when it woke, and its stall in seconds
        self._due = self._cpu = 0.0

    def start(self) -> None:
        self._due, self._cpu = time.perf_counter() + TICK_S, time.process_time()
        asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        self.late.append((now, max(0.0, min(now - self._due, cpu - self._cpu))))
        self.start()

    def within(self, begin: float, end: float) -> list[float]:
        return [late for now, late in self.late if begin <= now <= end]

    def save(self, path: Path, phases: list[tuple[str, float, float]]) -> None:
        """In Chrome's trace format: what arrived when, and the stalls of over half a millisecond."""
        spans = [(name, begin, end, 1) for name, begin, end in phases]
        spans += [("stall", now - late, now, 2) for now, late in self.late if late > 0.5e-3]
        events = [
            {"name": name, "ph": "X", "ts": 1e6 * begin, "dur": 1e6 * (end - begin), "pid": 1, "tid": track}
            for name, begin, end, track in spans
        ]
        path.write_text(json.dumps({"traceEvents": events}))


async def post(port: int, path: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**26)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return reader, writer


async def stream(port: int, gaps: list[float], latencies: list[float]) -> None:
    """Reads a stream for ever."""
    body = {"prompt": [5, 6, 7], "max_tokens": 190_000, "stream": True, "ignore_eos": True}
    reader, writer = await post(port, "/v1/completions", json.dumps(body).encode())
    last = 0.0
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            now = time.perf_counter()
            gaps.append(now - last if last else 0.0)
            last = now
    writer.close()


def long_bodies() -> dict[str, tuple[str, bytes]]:
    text = (TEXT * TOKENS)[: int(TOKENS * CHARACTERS_A_TOKEN)]
    ids = [1000 + (7919 * at) % 7000 for at in range(TOKENS)]
    few: dict[str, Any] = {"max_tokens": 2}
    bodies = {
        "token ids": ("/v1/completions", few | {"prompt": ids}),
        "text": ("/v1/completions", few | {"prompt": text}),
        "chat": ("/v1/chat/completions", few | {"messages": [{"role": "user", "content": text}]}),
    }
    return {name: (path, json.dumps(body).encode()) for name, (path, body) in bodies.items()}


async def clients(port: int, streams: int, repeats: int) -> None:
    """Prints when each phase began and ended, and the gaps that streams saw in it."""
    gaps: list[float] = []
    bodies = long_bodies()
    tasks = [asyncio.create_task(stream(port, gaps, [])) for _ in range(streams)]
    await asyncio.sleep(1.0)

    def say(name: str, begin: float) -> None:
        print(json.dumps([name, begin, time.perf_counter(), max(gaps, default=0.0)]), flush=True)
        gaps.clear()

    for name in ["streams alone", *bodies] * repeats:
        gaps.clear()
        begin = time.perf_counter()
        if name in bodies:
            path, body = bodies[name]
            reader, writer = await post(port, path, body)
            answer = await reader.read()
            assert b" 200 OK" in answer[:40], answer[:400]
            writer.close()
        else:
            await asyncio.sleep(0.5)
        await asyncio.sleep(0.1)
        say(name, begin)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], Watch, list[tuple[str, float, float]]]:
    llm = AsyncLLM(EngineConfig(device="cpu"))
    await llm.start()
    steady_interpreter()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(make_app(llm), log_level="warning", access_log=False, lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        command = [sys.executable, __file__, "--clients", str(port), "--streams", str(arguments.streams)]
        process = await asyncio.create_subprocess_exec(
            *command, "--repeats", str(arguments.repeats), stdout=asyncio.subprocess.PIPE
        )
        watch = Watch()
        watch.start()
        assert process.stdout is not None
        lines = [json.loads(line) async for line in process.stdout]
        assert await process.wait() == 0, "the clients failed"
        server.should_exit = True
        await serving
    await llm.close()
    found: dict[str, dict[str, list[float]]] = {}
    for name, begin, end, gap in lines:
        figures = found.setdefault(name, {"worst_stall_ms": [], "p99_stall_ms": [], "worst_client_gap_ms": []})
        stalls = watch.within(begin, end)
        figures["worst_stall_ms"].append(1e3 * max(stalls))
        figures["p99_stall_ms"].append(1e3 * percentiles(stalls)["p99"])
        figures["worst_client_gap_ms"].append(1e3 * gap)
    return found, watch, [(name, begin, end) for name, begin, end, _ in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--clients", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.clients is not None:
        with suppress(KeyboardInterrupt):
            asyncio.run(clients(arguments.clients, arguments.streams, arguments.repeats))
        return
    FakeChild.step_ms = arguments.step_ms
    engine_process.Child = FakeChild  # type: ignore[misc, assignment]
    found, watch, phases = asyncio.run(measure(arguments))
    medians = {
        name: {figure: round(statistics.median(values), 2) for figure, values in figures.items()}
        for name, figures in found.items()
    }
    for name, figures in medians.items():
        print(f"{name:14}", figures)
    if arguments.trace is not None:
        watch.save(arguments.trace, phases)
    if arguments.output is not None:
        settings = {"streams": arguments.streams, "prompt_tokens": TOKENS, "step_ms": arguments.step_ms}
        write(arguments.output, {"benchmark": "api_stalls", **settings, "medians": medians, "runs": found})


if __name__ == "__main__":
    main()
