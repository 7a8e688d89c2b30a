"""A server under load, over HTTP: streams of completions, arriving at random at a given rate or all at once."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import msgspec

from anychip.bench.offline import Advance
from anychip.bench.report import percentiles
from anychip.bench.workload import Workload
from anychip.errors import ConfigError
from anychip.sampling_params import SamplingParams

if TYPE_CHECKING:
    import httpx


@dataclass(slots=True)
class Answer:
    """Moments of one request, in seconds; `error` says why it has none."""

    asked: float
    tokens: list[float] = field(default_factory=list)
    error: str = ""


def serve_load(
    url: str,
    workload: Workload,
    *,
    vocab_size: int,
    rate: float,
    concurrency: int,
    api_key: str | None,
    advance: Advance,
    slo: Slo | None = None,
) -> dict[str, Any]:
    """`rate` requests arrive a second, at random, 0: all at once; at most `concurrency` are open. With an SLO, goodput
    counts the requests that met it. Raises ConfigError when the server does not answer."""
    try:
        import httpx
    except ImportError as error:
        raise ConfigError("bench serve needs httpx: pip install anychip[bench]") from error

    async def run() -> list[Answer]:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=concurrency)
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits) as client:
            return await _send_all(client, workload, vocab_size, rate, concurrency, advance)

    began = time.perf_counter()
    try:
        answers = asyncio.run(run())
    except httpx.HTTPError as error:
        raise ConfigError(f"the server at {url} does not answer: {type(error).__name__}: {error}") from error
    return _summary(answers, time.perf_counter() - began, workload, vocab_size, slo)


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What a request must keep to be good: seconds to its first token, and between its tokens on average."""

    first_token_s: float = float("inf")
    between_tokens_s: float = float("inf")

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Of `ttft=0.5,tpot=0.05`. Raises ConfigError."""
        names = {"ttft": "first_token_s", "tpot": "between_tokens_s"}
        try:
            given = dict(part.split("=") for part in text.split(","))
            return cls(**{names[name]: float(value) for name, value in given.items()})
        except (ValueError, KeyError) as error:
            raise ConfigError(f"--slo {text!r} is not like ttft=0.5,tpot=0.05") from error

    def kept_by(self, answer: Answer) -> bool:
        gaps = len(answer.tokens) - 1
        mean = (answer.tokens[-1] - answer.tokens[0]) / gaps if gaps else 0.0
        return answer.tokens[0] - answer.asked <= self.first_token_s and mean <= self.between_tokens_s


def _goodput(served: list[Answer], asked: int, seconds: float, slo: Slo) -> dict[str, Any]:
    good = sum(slo.kept_by(answer) for answer in served)
    return {"good_share": good / asked, "goodput_requests_per_s": good / seconds}


async def _send_all(
    client: httpx.AsyncClient, workload: Workload, vocab_size: int, rate: float, concurrency: int, advance: Advance
) -> list[Answer]:
    model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
    rng, room, done = random.Random(workload.seed), asyncio.Semaphore(concurrency), 0

    async def one(prompt: list[int], sampling: SamplingParams) -> Answer:
        nonlocal done
        async with room:
            answer = await _stream(client, model, prompt, sampling.max_tokens or 1)
        done += 1
        advance(done)
        return answer

    tasks = []
    for prompt, sampling in workload.requests(vocab_size):
        tasks.append(asyncio.create_task(one(prompt, sampling)))
        if rate > 0:
            await asyncio.sleep(rng.expovariate(rate))
    return list(await asyncio.gather(*tasks))


async def _stream(client: httpx.AsyncClient, model: str, prompt: list[int], max_tokens: int) -> Answer:
    from httpx import HTTPError

    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    answer = Answer(time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.error = f"{response.status_code} {(await response.aread()).decode()[:200]}"
                return answer
            async for line in response.aiter_lines():
                if line.startswith("data: {") and json.loads(line[6:]).get("choices"):
                    answer.tokens.append(time.perf_counter())
    except (OSError, HTTPError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


def _summary(
    answers: list[Answer], seconds: float, workload: Workload, vocab_size: int, slo: Slo | None
) -> dict[str, Any]:
    served = [answer for answer in answers if not answer.error and answer.tokens]
    params = [sampling.max_tokens or 0 for _, sampling in workload.requests(vocab_size)]
    written = sum(count for count, answer in zip(params, answers, strict=True) if not answer.error)
    samples = {
        "first_token_s": [answer.tokens[0] - answer.asked for answer in served],
        "between_tokens_s": [b - a for answer in served for a, b in pairwise(answer.tokens)],
        "request_s": [answer.tokens[-1] - answer.asked for answer in served],
    }
    return {
        "seconds": seconds,
        "requests": len(answers),
        "failed": len(answers) - len(served),
        "first_error": next((answer.error for answer in answers if answer.error), None),
        "requests_per_s": len(served) / seconds,
        "output_tokens_per_s": written / seconds,
        **({} if slo is None else _goodput(served, len(answers), seconds, slo)),
        **{name: percentiles(values) for name, values in samples.items()},
        "samples": samples,
    }
