"""A thousand streams at once at one server, three rounds: how many are lost, whether memory stays flat, and what a
token costs the API process and the engine.

python benchmarks/streams.py --streams 1000 --rounds 3 --output benchmarks/results/serving/streams.json
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from anychip.bench.report import percentiles, write

sys.path.insert(0, str(Path(__file__).parents[1] / "core/tests"))
from served import Server, resident_mib


async def one(client: httpx.AsyncClient, number: int, tokens: int, first: list[float]) -> int:
    """Tokens of one stream."""
    body = {
        "prompt": [3 + (number * 7919 + at) % 8000 for at in range(32)], "max_tokens": tokens, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True}, "temperature": 1, "seed": number,
        "repetition_penalty": 1.0,
    }  # fmt: skip
    began, count = time.perf_counter(), 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if not count:
                first.append(time.perf_counter() - began)
            count = 1
            if '"usage":{' in line:
                return int(line.partition('"completion_tokens":')[2].partition(",")[0])
    return 0


async def round_of(server: Server, streams: int, tokens: int) -> dict[str, Any]:
    first: list[float] = []
    limits = httpx.Limits(max_connections=None)
    before, began = cpu_seconds(server), time.perf_counter()
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        counts = await asyncio.gather(*(one(client, n, tokens, first) for n in range(streams)), return_exceptions=True)
    seconds, after = time.perf_counter() - began, cpu_seconds(server)
    whole = sum(1 for count in counts if count == tokens)
    written = sum(count for count in counts if isinstance(count, int))
    return {
        "seconds": seconds,
        "lost": streams - whole,
        "output_tokens_per_s": written / seconds,
        "first_token_s": percentiles(first),
        "api_cpu_us_per_token": 1e6 * (after["api"] - before["api"]) / written,
        "engine_cpu_us_per_token": 1e6 * (after["engine"] - before["engine"]) / written,
        "api_resident_mib": resident_mib(server.process.pid),
        "engine_resident_mib": resident_mib(server.engine_pid()),
    }


def cpu_seconds(server: Server) -> dict[str, float]:
    """User and system time of both processes."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = {}
    for name, pid in (("api", server.process.pid), ("engine", server.engine_pid())):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        found[name] = (int(fields[11]) + int(fields[12])) / ticks
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    server = Server("--device", "cpu", "--kv-cache-bytes", "256M")
    rounds = []
    try:
        for _ in range(arguments.rounds):
            rounds.append(asyncio.run(round_of(server, arguments.streams, arguments.tokens)))
            print({name: round(value, 1) for name, value in rounds[-1].items() if isinstance(value, int | float)})
    finally:
        server.stop()
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {"streams": arguments.streams, "tokens": arguments.tokens, "model": "quickstart"}
        write(arguments.output, {"benchmark": "streams", **settings, "rounds": rounds})


if __name__ == "__main__":
    main()
