"""Mutated requests at a server: none may be answered with status 500 or hang, and the server may not grow.

python tools/fuzz.py --requests 100000
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "core/tests"))
from served import Server, children, resident_mib

HANG_S = 10
BOUNDED = ("--max-model-len", "128")
"""An answer without max_tokens is as long as the context: a long answer is no hang."""

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
SEEDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {
        "prompt": "def f(", "max_tokens": 3, "n": 2, "stop": ["x"], "logprobs": 1, "echo": True, "seed": 1,
        "top_k": 5, "logit_bias": {"5": 1}, "bad_words": ["a"], "stream": True,
        "stream_options": {"include_usage": True},
    }),
    ("/v1/completions", {"prompt": [[5, 6], [7]], "max_tokens": 2, "allowed_token_ids": [5, 6], "min_tokens": 1}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 4, "structured_outputs": {"regex": "(a|b)+c?"}}),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 2, "tools": [TOOL],
        "tool_choice": "auto", "logprobs": True, "top_logprobs": 2, "chat_template_kwargs": {"a": 1},
    }),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 8,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
                "type": "object", "required": ["a"],
            "properties": {"a": {"type": "string", "pattern": "^a+$", "maxLength": 4}},
        }}},
    }),
    ("/v1/responses", {
        "input": [{"role": "user", "content": "x"}, {"type": "function_call_output", "call_id": "c", "output": "y"}],
        "max_output_tokens": 2, "instructions": "z", "text": {"format": {"type": "text"}}, "store": False,
    }),
    ("/v1/messages", {
        "model": "quickstart", "max_tokens": 2, "system": "x", "tools": [{"name": "f", "input_schema": {}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "stream": True,
    }),
    ("/v1/messages/count_tokens", {"model": "quickstart", "messages": [{"role": "user", "content": "x"}]}),
    ("/tokenize", {"prompt": "x", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [5, 6]}),
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 2**70, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "\x00", "\u202e", "{{ 7*7 }}", "{% for i in range(10**9) %}x{% endfor %}", "a" * 5000, "(a{1000}){1000}", [], {},
    [[]], "(((((a+)+)+)+)+)+$", [None], {"": ""}, {"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}}, [1] * 500,
    "http://169.254.169.254/",
]  # fmt: skip


@dataclass
class Findings:
    statuses: Counter[int] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    slowest_s: float = 0.0


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """A seed with some of it replaced, removed, repeated or renamed; now and then with bytes changed."""
    path, seed = rng.choice(SEEDS)
    body: Any = copy.deepcopy(seed)
    for _ in range(rng.choice([1, 1, 2, 4])):
        holder, key = _place(rng, body)
        if holder is None:
            continue
        change = rng.random()
        if change < 0.6:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif change < 0.75:
            del holder[key]
        elif isinstance(holder, list):
            holder.extend([copy.deepcopy(holder[key])] * rng.choice([1, 50]))
        else:
            holder[rng.choice(["", "x", "model", "n", "\ud83d", "type"])] = holder.pop(key)
    raw = json.dumps(body).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        data = bytearray(raw)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        raw = bytes(data)
    return path, raw


def _place(rng: random.Random, body: Any) -> tuple[Any, Any]:
    """A random container within a body, and one of its keys."""
    holder, key = None, None
    here = body
    while isinstance(here, dict | list) and here:
        holder = here
        key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        here = here[key]
        if rng.random() < 0.4:
            break
    return holder, key


async def fuzz(server: Server, *, requests: int, seed: int, concurrency: int = 16) -> Findings:
    findings, room = Findings(), asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=server.url, timeout=HANG_S) as client:

        async def one(number: int) -> None:
            path, raw = mutated(random.Random(seed * 1_000_003 + number))
            async with room:
                began = time.perf_counter()
                try:
                    response = await client.post(path, content=raw)
                except httpx.HTTPError as error:
                    findings.broken.append(f"{type(error).__name__} {path} {raw[:300]!r}")
                    return
                findings.slowest_s = max(findings.slowest_s, time.perf_counter() - began)
                findings.statuses[response.status_code] += 1
                if response.status_code >= 500:
                    findings.broken.append(f"{response.status_code} {path} {raw[:300]!r}: {response.text[:200]}")

        for start in range(0, requests, 2000):
            await asyncio.gather(*(one(number) for number in range(start, min(requests, start + 2000))))
    return findings


def all_resident_mib(server: Server) -> float:
    """Of the API process and its children."""
    return sum(resident_mib(pid) for pid in [server.process.pid, *children(server.process.pid)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    server = Server("--device", "cpu", "--kv-cache-bytes", "64M", *BOUNDED)
    try:
        began = time.perf_counter()
        warm = asyncio.run(fuzz(server, requests=min(5000, arguments.requests // 4), seed=arguments.seed + 1))
        before = all_resident_mib(server)
        findings = asyncio.run(fuzz(server, requests=arguments.requests, seed=arguments.seed))
        print(
            f"{arguments.requests} requests in {time.perf_counter() - began:.0f} s: {dict(findings.statuses)}, slowest "
            f"{findings.slowest_s:.2f} s, resident {before:.0f} MiB before and {all_resident_mib(server):.0f} MiB after"
        )
        broken = warm.broken + findings.broken
        for problem in broken[:20]:
            print(f"  {problem}")
        return 1 if broken else 0
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())
