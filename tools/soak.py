"""A server under mixed load for a while; then what must hold: the memory of its processes is flat after the warm-up, no
request and no block is left, no file is left open, and nothing unexpected is in the log.

python tools/soak.py --minutes 30

The KV cache is small, so that the warm-up has touched every page of it: what grows afterwards is a leak.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "core/tests"))
from chaos import Tally, leftovers, one_request, random_body
from served import Server, resident_mib

_KV_CACHE = "64M"
_SAMPLE_S = 2.0
_WARM_UP = 0.4
"""The share of the time after which memory must be flat, where that is longer than `_WARM_UP_S`."""

_WARM_UP_S = 60.0
_GROWTH_MIB = 8.0
"""And one part in a hundred: what allocators keep differs from minute to minute."""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"x": {"type": kind}}, "required": ["x"]},
        },
    }
    for name, kind in (("look_up", "string"), ("add", "integer"))
]
REGEXES = ("(yes|no)", "[0-9]{1,4}", "a+b?c", r"\d{4}-\d{2}-\d{2}")


_EXPECTED = {"answered", "streamed", "client left", "refused 400"}
"""How requests may end at a server that nothing is done to."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Of one moment."""

    seconds: float
    requests: int
    api_mib: float
    engine_mib: float
    open_files: int


def mixed_body(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """chaos.random_body's kinds, and tools, grammars, long prompts, other APIs, wrong requests."""
    user = [{"role": "user", "content": "How do I " + "very " * rng.randrange(60) + "well sort a list?"}]
    stream = rng.random() < 0.6
    kind = rng.random()
    if kind < 0.45:
        return random_body(rng)
    if kind < 0.6:
        choice = rng.choice(["auto", "required", "none"])
        body = {"messages": user, "tools": TOOLS, "tool_choice": choice, "max_tokens": 60, "stream": stream}
        return "/v1/chat/completions", body
    if kind < 0.7:
        wanted = {"regex": rng.choice(REGEXES)}
        return "/v1/completions", {"prompt": "x", "max_tokens": 20, "structured_outputs": wanted, "stream": stream}
    if kind < 0.78:
        prompt = [rng.randrange(20, 8000) for _ in range(rng.randrange(800, 1900))]
        return "/v1/completions", {"prompt": prompt, "max_tokens": 20, "stream": stream}
    if kind < 0.84:
        body = {"messages": user, "max_tokens": 30, "n": 3, "logprobs": True, "top_logprobs": 5, "stream": stream}
        return "/v1/chat/completions", body
    if kind < 0.9:
        return "/v1/responses", {"input": "How do I sort?", "max_output_tokens": 30, "stream": stream}
    if kind < 0.95:
        return "/v1/messages", {"model": "quickstart", "messages": user, "max_tokens": 30, "stream": stream}
    return rng.choice(
        [
            ("/v1/chat/completions", {"messages": "not a list"}),
            ("/v1/completions", {"prompt": "x", "max_tokens": -1}),
            ("/v1/completions", {"prompt": [10**9], "stream": True}),
            ("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "("}}),
            ("/v1/completions", {"prompt": [5] * 5000}),
        ]
    )


async def soak(server: Server, *, seconds: float, concurrency: int, seed: int) -> tuple[Tally, list[Sample]]:
    """Keeps `concurrency` requests open for so long."""
    tally, samples = Tally(), [_sample(server, 0.0, 0)]
    began = time.monotonic()
    deadline = began + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as client:

        async def caller(number: int) -> None:
            rng = random.Random(seed * 1_000_003 + number)
            while time.monotonic() < deadline:
                await one_request(client, rng, tally, mixed_body)

        callers = [asyncio.create_task(caller(number)) for number in range(concurrency)]
        shown = began
        while time.monotonic() < deadline:
            await asyncio.sleep(_SAMPLE_S)
            samples.append(_sample(server, time.monotonic() - began, tally.ends.total()))
            if time.monotonic() - shown >= seconds / 12:
                shown = time.monotonic()
                print(_line(samples[-1]), flush=True)
        await asyncio.gather(*callers)
    return tally, samples


def _sample(server: Server, seconds: float, requests: int) -> Sample:
    api = server.process.pid
    files = len(list(Path(f"/proc/{api}/fd").iterdir()))
    return Sample(seconds, requests, resident_mib(api), resident_mib(server.engine_pid()), files)


def _line(sample: Sample) -> str:
    return (
        f"{sample.seconds:6.0f} s {sample.requests:8d} requests  API {sample.api_mib:7.1f} MiB  "
        f"engine {sample.engine_mib:7.1f} MiB  {sample.open_files} open files"
    )


def growth(samples: Sequence[Sample]) -> tuple[list[str], list[str]]:
    """What to say of the memory after the warm-up, and what is wrong with it: medians of its first and last thirds."""
    total = samples[-1].seconds
    flat = [sample for sample in samples if sample.seconds >= min(total / 2, max(_WARM_UP * total, _WARM_UP_S))]
    third = max(1, len(flat) // 3)
    said, problems = [], []
    for name in ("api_mib", "engine_mib"):
        first, last = (
            statistics.median(getattr(sample, name) for sample in part) for part in (flat[:third], flat[-third:])
        )
        line = f"{name.removesuffix('_mib')}: {first:.1f} MiB after the warm-up, {last:.1f} MiB at the end"
        said.append(line)
        if last - first > _GROWTH_MIB + first / 100:
            problems.append(f"{line}: it grows")
    return said, problems


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-option", action="append", default=[], help="of `anychip serve`")
    arguments = parser.parse_args(argv)
    server = Server("--device", "cpu", "--kv-cache-bytes", _KV_CACHE, *arguments.server_option)
    try:
        engine, seconds = server.engine_pid(), arguments.minutes * 60
        tally, samples = asyncio.run(
            soak(server, seconds=seconds, concurrency=arguments.concurrency, seed=arguments.seed)
        )
        said, problems = growth(samples)
        problems += tally.lost[:20]
        problems += [f"{count} {end}" for end, count in tally.ends.items() if end not in _EXPECTED]
        problems += [f"{name} is {value} at the end" for name, value in leftovers(server).items()]
        files = _sample(server, 0.0, 0).open_files
        if files > samples[0].open_files + 8:
            problems.append(f"{files} files are open at the end, {samples[0].open_files} were at the start")
        if server.engine_pid() != engine:
            problems.append("the engine was started again")
        problems += [line for line in server.log().splitlines() if "Traceback" in line][:1]
        print(f"{tally}", *said, sep="\n")
        for problem in problems:
            print(f"  {problem}")
        return 1 if problems else 0
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())
