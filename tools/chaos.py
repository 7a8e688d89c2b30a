"""Requests of every kind at a server while its processes are killed, its clients leave and its queue is full; then what
must hold: every request has ended in a result or an error, no block and no request is left, the server is ready again.

python tools/chaos.py --requests 10000 --concurrency 200 --kills 5 [--victim worker]

With --hang, the victim is stopped (SIGSTOP) during 20 streams, and what must hold of a hang is measured: every request
ends with the cause within the step timeout and 5 s, /health and /ready are 503 meanwhile, the server is ready again at
most 6 s after, and every block is free.

python tools/chaos.py --hang --victim worker --step-timeout-s 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "core/tests"))
from served import Server, children

_PATIENCE_S = 120
"""A request that has neither ended nor failed after that has been lost."""

_RETRIES = 20
"""As a client does that is told to come again."""

MakeBody = Callable[[random.Random], tuple[str, dict[str, Any]]]
"""A route and a body for it."""

_REFUSALS = {400, 408, 409, 429, 503}

_LAST_EVENT = re.compile(r'data: \{"type": ?"(message_stop|response\.(completed|incomplete|failed))"')
"""Of a stream of another API than the completions'."""

_ENDS_WITHIN_S = 5.0
_READY_WITHIN_S = 6.0


@dataclass
class Tally:
    """How requests ended, and what must not have been."""

    ends: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    ready_s: list[float] = field(default_factory=list)
    """From each kill until the server was ready again."""

    def __str__(self) -> str:
        ends = ", ".join(f"{count} {end}" for end, count in self.ends.most_common())
        ready = ", ".join(f"{seconds:.1f} s" for seconds in self.ready_s) or "never killed"
        return f"{ends}; lost: {len(self.lost)}; ready again after {ready}"


@dataclass
class Hang:
    """What 20 streams saw of a process that was stopped. Times are seconds."""

    step_timeout_s: float
    ends: list[float] = field(default_factory=list)
    """Of each stream, since the stop."""
    causes: Counter[str] = field(default_factory=Counter)
    ready_after: float = 0.0
    """Since the last stream's end."""
    refused: set[str] = field(default_factory=set)
    """Which of /health and /ready were 503 before the server was ready again."""

    @property
    def problems(self) -> list[str]:
        found = []
        if max(self.ends) > self.step_timeout_s + _ENDS_WITHIN_S:
            found.append(f"a stream ended after {max(self.ends):.1f} s")
        found += [f"{count} streams ended so: {end}" for end, count in self.causes.items() if "made no prog" not in end]
        if self.ready_after > _READY_WITHIN_S:
            found.append(f"ready again {self.ready_after:.1f} s after the last stream's end")
        if self.refused != {"/health", "/ready"}:
            found.append(f"503 from {sorted(self.refused)} alone")
        return found

    def __str__(self) -> str:
        ends = f"{len(self.ends)} streams ended {min(self.ends):.1f} to {max(self.ends):.1f} s after the stop"
        return (
            f"{ends} (step timeout {self.step_timeout_s:.0f} s); ready again {self.ready_after:.1f} s later; 503 from "
            f"{', '.join(sorted(self.refused))} meanwhile; {self.causes.most_common(1)[0][0]}"
        )


def random_body(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A route and a body: plain, streamed, several, beams, grammars, long prompts, some of them wrong."""
    tokens = [rng.randrange(20, 8000) for _ in range(rng.choice([1, 5, 40, 300]))]
    base: dict[str, Any] = {"max_tokens": rng.choice([1, 5, 30, 120]), "stream": rng.random() < 0.6}
    kind = rng.random()
    if kind < 0.35:
        return "/v1/completions", {**base, "prompt": tokens}
    if kind < 0.6:
        message = {"role": "user", "content": "How do I " + "very " * rng.randrange(40) + "well sort a list?"}
        return "/v1/chat/completions", {**base, "messages": [message], "temperature": rng.choice([0, 1])}
    if kind < 0.7:
        return "/v1/completions", {**base, "prompt": tokens, "n": rng.randrange(2, 5), "presence_penalty": 0.5}
    if kind < 0.8:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return "/v1/completions", {**base, "prompt": tokens, "response_format": form}
    if kind < 0.87:
        return "/v1/completions", {**base, "prompt": tokens[:40], "stream": False, "beam_width": 3, "n": 2}
    if kind < 0.93:
        return "/v1/completions", {**base, "prompt": tokens, "echo": True, "logprobs": 2}
    return "/v1/completions", {**base, "prompt": tokens, "temperature": -1}


async def one_request(
    client: httpx.AsyncClient, rng: random.Random, tally: Tally, make: MakeBody = random_body
) -> None:
    path, body = make(rng)
    leaves_after = rng.randrange(1, 20) if rng.random() < 0.15 else None
    pause = rng.choice([0, 0, 0, 0.02])  # some read slowly
    try:
        async with asyncio.timeout(_PATIENCE_S):
            for _ in range(_RETRIES):
                if body.get("stream"):
                    end = await _stream(client, path, body, leaves_after, pause)
                else:
                    end = await _whole(client, path, body)
                if end != "refused 503":
                    break
                tally.ends["tried again"] += 1
                await asyncio.sleep(0.5)
    except TimeoutError:
        tally.lost.append(f"no end within {_PATIENCE_S} s: {path} {json.dumps(body)[:200]}")
        return
    except httpx.TransportError as error:
        tally.lost.append(f"{type(error).__name__} {error}: {path} {json.dumps(body)[:200]}")
        return
    tally.ends[end] += 1


async def _whole(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> str:
    response = await client.post(path, json=body)
    return _status(response.status_code, response.text)


async def _stream(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], leaves_after: int | None, pause: float
) -> str:
    async with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            return _status(response.status_code, (await response.aread()).decode())
        events, error, done = 0, False, False
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            events += 1
            done = line == "data: [DONE]" or _LAST_EVENT.match(line) is not None
            error = error or '"error":{' in line.replace(" ", "")
            if leaves_after is not None and events >= leaves_after:
                return "client left"
            if pause:
                await asyncio.sleep(pause)
        if not done:
            raise httpx.RemoteProtocolError("a stream ended without its end")
        return "error event" if error else "streamed"


def _status(status: int, text: str) -> str:
    if status == 200:
        return "answered"
    if status not in _REFUSALS:
        raise httpx.RemoteProtocolError(f"status {status}: {text[:200]}")
    return f"refused {status}"


async def storm(
    server: Server, *, requests: int, concurrency: int, kills: int, seed: int, victim: str = "engine"
) -> Tally:
    """Sends the requests; kills the engine, or a worker of its, at random moments meanwhile."""
    rng, tally, room = random.Random(seed), Tally(), asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as client:

        async def bounded(number: int) -> None:
            async with room:
                await one_request(client, random.Random(seed * 1_000_003 + number), tally)

        tasks = [asyncio.create_task(bounded(number)) for number in range(requests)]
        killer = asyncio.create_task(_kill(server, client, kills, rng, tally, victim))
        await asyncio.gather(*tasks)
        await killer
        await _until_ready(client)
    return tally


async def hang(server: Server, *, victim: str, step_timeout_s: float, streams: int = 20) -> Hang:
    """Stops the engine, or a worker of its, once all streams have begun."""
    seen = Hang(step_timeout_s)
    begun = [asyncio.Event() for _ in range(streams)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=_PATIENCE_S, limits=limits) as client:

        async def stream(number: int) -> str:
            body = {"prompt": [5 + number] * 20, "max_tokens": 2000, "ignore_eos": True, "stream": True}
            last = ""
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        begun[number].set()
                        last = line.removeprefix("data: ")
            seen.ends.append(time.perf_counter() - stopped_at)
            error = json.loads(last).get("error")
            return "no error" if error is None else str(error["message"])

        stopped_at = float("inf")
        tasks = [asyncio.create_task(stream(number)) for number in range(streams)]
        await asyncio.gather(*(event.wait() for event in begun))
        pids = server.engine_pids() if victim == "engine" else children(server.engine_pid())
        os.kill(pids[-1], signal.SIGSTOP)
        stopped_at = time.perf_counter()
        seen.causes.update(await asyncio.gather(*tasks))
        ended_at = time.perf_counter()
        for path in ("/health", "/ready"):
            if (await client.get(path)).status_code == 503:
                seen.refused.add(path)
        await _until_ready(client)
        seen.ready_after = time.perf_counter() - ended_at
    return seen


async def _kill(
    server: Server, client: httpx.AsyncClient, kills: int, rng: random.Random, tally: Tally, victim: str
) -> None:
    for _ in range(kills):
        await asyncio.sleep(rng.uniform(0.3, 2.0))
        found = server.engine_pids()
        if victim == "worker":
            found = [worker for engine in found for worker in children(engine)]
        if not found:
            continue
        os.kill(rng.choice(found), signal.SIGKILL)
        began = time.perf_counter()
        await _while_ready(client)
        await _until_ready(client)
        tally.ready_s.append(time.perf_counter() - began)


async def _while_ready(client: httpx.AsyncClient) -> None:
    """Until the server has noticed, or a moment has passed."""
    for _ in range(40):
        if (await client.get("/ready")).status_code != 200:
            return
        await asyncio.sleep(0.05)


async def _until_ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(_PATIENCE_S):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.05)


def leftovers(server: Server) -> dict[str, float]:
    """What a server without requests must not hold. Numbers come with the engine's next sign of life."""
    names = ("anychip_num_requests_running", "anychip_num_requests_waiting", "anychip_kv_cache_usage_ratio")
    for _ in range(40):
        found = {name: server.metric(name) for name in names}
        if not any(found.values()):
            break
        time.sleep(0.1)
    return {name: value for name, value in found.items() if value}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=200)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--victim", choices=["engine", "worker"], default="engine")
    parser.add_argument("--hang", action="store_true", help="stop the victim instead of killing it")
    parser.add_argument("--step-timeout-s", type=float, default=5.0, help="with --hang")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-option", action="append", default=[], help="of `anychip serve`")
    arguments = parser.parse_args(argv)
    more = ["--tensor-parallel-size", "2"] if arguments.victim == "worker" else []
    if arguments.hang:
        return _show_hang(arguments, more)
    server = Server("--device", "cpu", "--restarts", str(arguments.kills + 1), *more, *arguments.server_option)
    try:
        began = time.perf_counter()
        tally = asyncio.run(
            storm(
                server,
                requests=arguments.requests,
                concurrency=arguments.concurrency,
                kills=arguments.kills,
                seed=arguments.seed,
                victim=arguments.victim,
            )
        )
        print(f"{arguments.requests} requests in {time.perf_counter() - began:.0f} s: {tally}")
        for problem in [*tally.lost[:20], *map(str, leftovers(server).items())]:
            print(f"  {problem}")
        return 1 if tally.lost or leftovers(server) else 0
    finally:
        server.stop()


def _show_hang(arguments: argparse.Namespace, more: Sequence[str]) -> int:
    timeout_s = arguments.step_timeout_s
    options = ["--device", "cpu", "--step-timeout-s", str(timeout_s), *more, *arguments.server_option]
    server = Server(*options)
    try:
        seen = asyncio.run(hang(server, victim=arguments.victim, step_timeout_s=timeout_s))
        problems = [*seen.problems, *map(str, leftovers(server).items())]
        shown = server.log().count("most recent call first")
        print(f"{arguments.victim} stopped: {seen}; stacks of {shown} threads in the log")
        for problem in problems:
            print(f"  {problem}")
        return 1 if problems else 0
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())
