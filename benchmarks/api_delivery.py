"""From the engine's message to a server-sent event's bytes: how many tokens a second the API process can turn over, and
how long a token takes at a given rate. The engine is a fake one; tokens come out as chat chunks, without HTTP.

python benchmarks/api_delivery.py --output benchmarks/results/serving/api_delivery.json
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

from api_stalls import Watch
from fake_engine import FakeChild

from anychip.bench.report import percentiles, write
from anychip.chat.parsers.registry import ChosenParsers
from anychip.config import EngineConfig
from anychip.entrypoints.http.server import steady_interpreter
from anychip.entrypoints.openai.chat import ChatAnswer
from anychip.entrypoints.openai.chat_protocol import ChatBody
from anychip.entrypoints.openai.responses import Reply
from anychip.entrypoints.turn import Turn, TurnRequest
from anychip.launch import engine_process
from anychip.launch.async_llm import AsyncLLM
from anychip.sampling_params import SamplingParams

LOADS = {1: 5.0, 64: 20.0, 1000: 150.0}
"""By number of streams: milliseconds of a step, at which the latency is taken."""


async def stream(llm: AsyncLLM, stops: tuple[str, ...], tokens: int, latencies: list[float]) -> None:
    sampling = SamplingParams(max_tokens=tokens, stop=stops)
    outputs = await llm.accept("measured", [5, 6, 7], sampling)
    turn = Turn(TurnRequest(messages=[], sampling=sampling), ChosenParsers(None, None, None, None), "", outputs)
    answer = ChatAnswer(
        body=ChatBody(messages=[{"role": "user", "content": "x"}], stream=True),  # type: ignore[list-item]
        reply=Reply(reply_id="a", kind="chat.completion.chunk", model="m", tokenizer=None),
        turn=turn,
    )
    inner = turn._piece

    def piece(output: Any, sequence: Any) -> Any:
        latencies.append(time.perf_counter() - output.queued_s)  # when the fake engine sent it
        return inner(output, sequence)

    turn._piece = piece  # type: ignore[method-assign]
    async for _ in answer.events():
        pass


async def measure(streams: int, step_ms: float, tokens: int, stops: tuple[str, ...]) -> dict[str, Any]:
    FakeChild.step_ms = step_ms
    llm = AsyncLLM(EngineConfig(device="cpu"))
    await llm.start()
    steady_interpreter()
    watch, latencies = Watch(), []
    watch.start()
    cpu, began = time.process_time(), time.perf_counter()
    await asyncio.gather(*(stream(llm, stops, tokens, latencies) for _ in range(streams)))
    cpu, ended = time.process_time() - cpu, time.perf_counter()
    await llm.close()
    seen = percentiles(latencies[streams * tokens // 10 :])
    stalls = percentiles(watch.within(began, ended))
    return {
        "cpu_us_per_token": round(1e6 * cpu / (streams * tokens), 2),
        "latency_ms": {name: round(1e3 * seen[name], 2) for name in ("p50", "p99")},
        "stall_ms": {name: round(1e3 * stalls[name], 2) for name in ("p50", "p99", "max")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=60_000, help="of all streams together")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    engine_process.Child = FakeChild  # type: ignore[misc, assignment]
    found = {}
    for stops in ((), ("\nUser:",)):
        for streams, step_ms in LOADS.items():
            tokens = min(600, arguments.tokens // streams)
            figures = asyncio.run(measure(streams, step_ms, tokens, stops))
            found[f"{streams} streams{', a stop string' if stops else ''}"] = figures
            print(f"{streams} streams, {step_ms} ms a step, stops {stops}: {figures}", flush=True)
    if arguments.output is not None:
        write(arguments.output, {"benchmark": "api_delivery", "step_ms": LOADS, "loads": found})


if __name__ == "__main__":
    main()
