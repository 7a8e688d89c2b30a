"""What dies, leaves or overflows: every accepted request ends, nothing is left behind. tools/chaos.py does the same
with ten thousand requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from served import Server, children, chunks_of

import anychip
from anychip import SamplingParams
from anychip.config import EngineConfig
from anychip.engine.async_engine import AsyncEngine
from anychip.errors import EngineDead
from anychip.launch.async_llm import AsyncLLM
from anychip_conformance.equality.tiny_models import make_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from chaos import hang, leftovers, storm


def is_running(pid: int) -> bool:
    """Not so of a zombie, which only waits for whoever adopted it."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


LONG = {"prompt": [5] * 20, "max_tokens": 400, "ignore_eos": True, "stream": True}


_WORKER = ("worker", ["--tensor-parallel-size", "2"])
_STAGE = ("worker", ["--pipeline-parallel-size", "3"])
_LANE = ("worker", ["--data-parallel-size", "2"])


@pytest.mark.parametrize(
    ("victim", "options"),
    [("engine", []), *(pytest.param(*each, marks=pytest.mark.full) for each in (_WORKER, _STAGE, _LANE))],
)
def test_requests_end_and_nothing_is_left_when_a_process_is_killed(victim, options):
    server = Server("--device", "cpu", "--kv-cache-bytes", "8M", *options)
    try:
        tally = asyncio.run(storm(server, requests=60, concurrency=20, kills=1, seed=4, victim=victim))
        assert tally.lost == []
        assert sum(tally.ends.values()) >= 60 and len(tally.ready_s) == 1
        assert leftovers(server) == {}
        assert server.metric("anychip_engine_restarts_total") == 1
    finally:
        assert server.stop() == 0


@pytest.mark.full
def test_requests_end_and_nothing_is_left_when_a_rank_is_killed_that_all_lanes_meet(tmp_path):
    """Of a mixture whose experts lie over the ranks of two lanes: the other lane waits within a layer."""
    make_checkpoint("qwen3-moe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    source = Path(anychip.__file__).parent / "quickstart"
    config["vocab_size"] = json.loads((source / "config.json").read_text())["vocab_size"]
    config["max_position_embeddings"] = 512
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, tmp_path)
    options = ("--device", "cpu", "--kv-cache-bytes", "8M", "--load-format", "dummy", "--data-parallel-size", "2")
    server = Server(str(tmp_path), *options, "--expert-parallel")
    try:
        tally = asyncio.run(storm(server, requests=60, concurrency=20, kills=1, seed=4, victim="worker"))
        assert tally.lost == []
        assert sum(tally.ends.values()) >= 60 and len(tally.ready_s) == 1
        assert leftovers(server) == {}
        assert server.metric("anychip_engine_restarts_total") == 1
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize(("victim", "options"), [("engine", []), _WORKER])
def test_requests_end_with_the_cause_when_a_process_hangs_and_the_engine_is_replaced(victim, options):
    server = Server("--device", "cpu", "--kv-cache-bytes", "64M", "--step-timeout-s", "4", *options)
    try:
        stopped = [server.engine_pid(), *children(server.engine_pid())]
        seen = asyncio.run(hang(server, victim=victim, step_timeout_s=4.0, streams=8))
        assert all("made no progress for" in cause and "--step-timeout-s" in cause for cause in seen.causes)
        assert seen.refused == {"/health", "/ready"} and len(seen.ends) == 8
        assert leftovers(server) == {}
        assert not any(is_running(pid) for pid in stopped)
        assert server.log().count("(most recent call first)") > 1
        assert server.post("/v1/completions", LONG | {"stream": False, "max_tokens": 2}).status_code == 200
    finally:
        assert server.stop() == 0


def test_an_engine_that_dies_too_often_stays_dead():
    server = Server("--device", "cpu", "--kv-cache-bytes", "32M", "--restarts", "1")
    try:
        os.kill(server.engine_pid(), signal.SIGKILL)
        while server.metric("anychip_engine_restarts_total") < 1:
            time.sleep(0.1)
        server.wait_until_ready()
        os.kill(server.engine_pid(), signal.SIGKILL)
        while server.client.get("/health").status_code == 200:
            time.sleep(0.1)
        time.sleep(1.0)  # long enough for a restart that must not be
        answer = server.client.get("/health")
        assert answer.status_code == 503 and "killed by signal 9" in answer.json()["error"]["message"]
        refused = server.post("/v1/completions", LONG)
        assert refused.status_code == 503 and refused.headers["retry-after"]
    finally:
        assert server.stop() == 0


def test_an_engine_whose_messages_cannot_be_read_is_dead_and_replaced(monkeypatch):
    deliver, failures = AsyncEngine._deliver, iter([ValueError("a planted fault")])

    async def fail_once(self, message):
        for failure in failures:
            raise failure
        await deliver(self, message)

    async def run() -> None:
        llm = AsyncLLM(EngineConfig(device="cpu", num_kv_blocks=64))
        await llm.start()
        try:
            monkeypatch.setattr(AsyncEngine, "_deliver", fail_once)
            with pytest.raises(EngineDead, match="could not be taken in: ValueError: a planted fault"):
                async for _ in await llm.accept("r-1", [5, 6, 7], SamplingParams(max_tokens=2)):
                    pass
            async with asyncio.timeout(60):
                while llm.dead is not None:
                    await asyncio.sleep(0.05)
            pieces = [piece async for piece in await llm.accept("r-2", [5, 6, 7], SamplingParams(max_tokens=2))]
            assert pieces[-1].finished
        finally:
            await llm.close()

    asyncio.run(run())


def test_a_full_queue_refuses_with_a_time_to_come_again():
    server = Server("--device", "cpu", "--kv-cache-bytes", "8M", "--max-num-seqs", "1", "--max-waiting", "2")
    try:
        tally: list[httpx.Response] = []

        def send() -> None:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                tally.append(
                    client.post("/v1/completions", json=LONG | {"max_tokens": 100, "stream": len(tally) % 2 == 0})
                )

        threads = [threading.Thread(target=send) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = [response.status_code for response in tally]
        assert statuses.count(200) >= 1 and statuses.count(429) >= 1 and set(statuses) == {200, 429}
        for response in tally:
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
                assert "requests wait, at most 2 may" in response.json()["error"]["message"]
        assert leftovers(server) == {}
    finally:
        assert server.stop() == 0


def test_sigterm_lets_requests_end_and_ends_those_that_take_too_long():
    server = Server("--device", "cpu", "--kv-cache-bytes", "32M", "--drain-s", "2", "--max-model-len", "2048")
    outcome: dict[str, list[dict]] = {}
    begun = {"short": threading.Event(), "long": threading.Event()}

    def stream(name: str, tokens: int) -> None:
        body = LONG | {"max_tokens": tokens, "n": 8}
        lines = []
        with (
            httpx.Client(base_url=server.url, timeout=60) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            for line in response.iter_lines():
                lines.append(line)
                begun[name].set()
        outcome[name] = chunks_of("\n".join(lines))

    threads = [threading.Thread(target=stream, args=pair) for pair in (("long", 1900), ("short", 10))]
    for thread in threads:
        thread.start()
    assert all(event.wait(60) for event in begun.values())
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(30)
    assert server.process.wait(15) == 0
    assert {choice["finish_reason"] for chunk in outcome["short"] for choice in chunk["choices"]} == {None, "length"}
    last = outcome["long"][-1]
    assert "error" in last or last["choices"][0]["finish_reason"] == "length"
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")


def test_when_the_api_process_dies_its_clients_see_it_and_the_engine_goes_too():
    server = Server("--device", "cpu", "--kv-cache-bytes", "32M")
    engine = server.engine_pid()
    seen: list[str] = []
    begun = threading.Event()

    def stream() -> None:
        with contextlib.suppress(httpx.TransportError), httpx.Client(base_url=server.url, timeout=60) as client:
            with client.stream("POST", "/v1/completions", json=LONG | {"n": 8}) as response:
                for line in response.iter_lines():
                    seen.append(line)
                    begun.set()
            seen.append("ended in peace")

    thread = threading.Thread(target=stream)
    thread.start()
    assert begun.wait(60)
    server.process.kill()
    thread.join(30)
    assert not thread.is_alive() and "ended in peace" not in seen
    for _ in range(100):
        if not Path(f"/proc/{engine}").exists():
            return
        time.sleep(0.1)
    raise AssertionError("the engine outlived the API process")


def test_a_request_ends_at_its_deadline():
    server = Server("--device", "cpu", "--kv-cache-bytes", "32M", "--request-timeout-s", "20")
    try:
        late = server.post("/v1/completions", LONG | {"stream": False, "deadline": 0.2, "max_tokens": 1900, "n": 16})
        assert late.status_code == 408 and "deadline" in late.json()["error"]["message"]
        assert server.post("/v1/completions", LONG | {"deadline": -1}).status_code == 400
        assert leftovers(server) == {}
    finally:
        assert server.stop() == 0
