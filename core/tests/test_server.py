"""The server as its users meet it: another process, HTTP, errors, streams, signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from served import CHAT, Server, children, events


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server("--device", "cpu", "--kv-cache-bytes", "32M")
    yield running
    running.stop()


def post(server: Server, path: str, body: object) -> httpx.Response:
    return server.post(path, body)


# -- answers ----------------------------------------------------------------------------------------------


def test_a_chat_completion_answers_text(server):
    answer = post(server, "/v1/chat/completions", CHAT).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 8


def test_a_stream_adds_up_to_the_whole_answer(server):
    whole = post(server, "/v1/chat/completions", CHAT).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(post(server, "/v1/chat/completions", CHAT | options))
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}


def test_cached_tokens_are_in_usage(server):
    body = {"prompt": [9 + (i * 5) % 8000 for i in range(512)], "max_tokens": 1}
    first, second = (post(server, "/v1/completions", body).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] == 496


def test_several_prompts_of_several_sequences_keep_their_order(server):
    body = {"prompt": ["import", "class"], "n": 2, "max_tokens": 3, "temperature": 1, "seed": 1, "logprobs": 1}
    answer = post(server, "/v1/completions", body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all(len(choice["logprobs"]["tokens"]) == 3 for choice in answer["choices"])


def test_models_version_and_health(server):
    assert server.client.get("/v1/models").json()["data"][0]["id"] == "quickstart"
    assert server.client.get("/v1/models/quickstart").json()["max_model_len"] == 2048
    assert server.client.get("/v1/models/gpt-4").status_code == 404
    assert server.client.get("/version").json()["version"]
    assert server.client.get("/health").status_code == 200


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "expected"),
    [
        ("completions", {"prompt": "x", "max_tokns": 5}, 400, "max_tokns", "unknown parameter 'max_tokns'"),
        ("chat/completions", CHAT | {"functions": []}, 400, "functions", "use tools"),
        ("completions", {"prompt": "x", "model": "gpt-4"}, 404, "model", "'gpt-4' does not exist"),
        ("completions", {"prompt": ""}, 400, "prompt", "the prompt is empty"),
        ("completions", {"prompt": []}, 400, "prompt", "the prompt is empty"),
        ("completions", {"prompt": [9999]}, 400, "prompt", "token id 9999; the vocabulary has 8192"),
        ("completions", {"prompt": [-1]}, 400, "prompt", "token id -1"),
        ("completions", {"prompt": [5] * 2048}, 400, "prompt", "context holds 2048"),
        ("completions", {"prompt": [5], "max_tokens": 2048}, 400, "max_tokens", "may be 2047 at most"),
        ("completions", {"prompt": "x" * 10**6}, 400, "prompt", "1000000 characters"),
        ("completions", {"prompt": "x", "temperature": -1}, 400, "temperature", "temperature is -1"),
        ("completions", '{"prompt": "x", "top_p": NaN}', 400, "top_p", "top_p is nan"),
        ("completions", {"prompt": "x", "n": 0}, 400, "n", "n is 0"),
        ("completions", {"prompt": "x", "max_tokens": "many"}, 400, "max_tokens", "max_tokens"),
        ("completions", '{"prompt": "x", ', 400, None, "not JSON"),
        ("completions", {}, 400, "prompt", "Field required"),
        ("chat/completions", {"messages": []}, 400, "messages", "at least 1 item"),
        ("chat/completions", CHAT | {"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    ],
)
def test_bad_input_is_refused_with_openais_error(server, path, body, status, param, expected):
    answer = post(server, f"/v1/{path}", body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert expected in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_after_refusals_the_server_still_answers(server):
    assert post(server, "/v1/chat/completions", CHAT).status_code == 200


def test_a_client_that_goes_away_frees_the_engine(server):
    body = {"prompt": "import os", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", "/v1/completions", content=json.dumps(body)) as response:
        next(response.iter_lines())
    began = time.monotonic()
    assert post(server, "/v1/chat/completions", CHAT).status_code == 200
    assert time.monotonic() - began < 60


def test_many_clients_at_once_all_get_their_answers_and_some_leave(server):
    async def one(client: httpx.AsyncClient, number: int) -> str:
        body = {
            "prompt": "import " * (1 + number % 7),
            "max_tokens": 4 + number % 13,
            "temperature": 0,
            "ignore_eos": True,
        }
        if number % 5 == 0:  # leaves in the middle
            with contextlib.suppress(httpx.TimeoutException):
                await client.post("/v1/completions", json=body | {"max_tokens": 1000}, timeout=0.3)
            return "left"
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == body["max_tokens"]
        return answer.json()["choices"][0]["text"]

    async def all_at_once() -> list[str]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(one(client, number) for number in range(60)))

    texts = asyncio.run(all_at_once())
    assert texts.count("left") == 12
    assert all(texts)


def test_the_api_process_never_loads_torch(server):
    post(server, "/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2})
    assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{server.engine_pid()}/maps").read_text()


# -- life and death ---------------------------------------------------------------------------------------


def test_a_dead_engine_fails_its_requests_and_health():
    server = Server("--device", "cpu", "--kv-cache-bytes", "32M")
    try:
        body = {"prompt": "import os", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with server.client.stream("POST", "/v1/completions", content=json.dumps(body)) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(server.engine_pid(), signal.SIGKILL)
            rest = "\n".join(lines)
        assert "killed by signal 9" in rest
        assert server.client.get("/health").status_code == 503
        for stream in (False, True):
            answer = post(server, "/v1/chat/completions", CHAT | {"stream": stream})
            assert answer.status_code == 503
            assert "killed by signal 9" in answer.json()["error"]["message"]
    finally:
        assert server.stop() == 0


def test_sigterm_leaves_nothing_running():
    server = Server("--device", "cpu", "--kv-cache-bytes", "32M")
    engine = server.engine_pid()
    assert server.stop() == 0
    assert not Path(f"/proc/{engine}").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_starting_leaves_nothing_running(number):
    server = Server("--device", "cpu", wait=False)
    while not server.engine_pids():  # a child is called an engine only once it runs the engine's program
        assert server.process.poll() is None, server.log()
        time.sleep(0.02)
    engine = server.engine_pid()
    server.process.send_signal(number)
    assert server.process.wait(10) == 0
    assert "Traceback" not in server.log()
    assert not Path(f"/proc/{engine}").exists()


def test_a_worker_that_dies_while_nothing_runs_is_noticed():
    server = Server("--device", "cpu", "--tensor-parallel-size", "2", "--kv-cache-bytes", "32M")
    try:
        assert post(server, "/v1/chat/completions", CHAT).status_code == 200
        workers = children(server.engine_pid())
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        for _ in range(100):
            if server.client.get("/health").status_code == 503:
                break
            time.sleep(0.1)
        answer = server.client.get("/health")
        assert answer.status_code == 503
        assert "worker 1 exited with status -9" in answer.json()["error"]["message"]
        server.wait_until_ready()
        assert post(server, "/v1/chat/completions", CHAT).status_code == 200
    finally:
        assert server.stop() == 0
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_the_engine_ends_and_cleans_up_when_the_api_process_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    server = Server("--device", "cpu", "--kv-cache-bytes", "32M")
    engine = server.engine_pid()
    assert list(tmp_path.glob("anychip-*/requests"))
    server.process.kill()
    server.process.wait()
    for _ in range(100):
        if not Path(f"/proc/{engine}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{engine}").exists()
    assert not list(tmp_path.glob("anychip-*"))


def test_an_api_key_is_asked_for_where_one_is_set():
    server = Server("--device", "cpu", "--kv-cache-bytes", "32M", "--api-key", "secret")
    try:
        assert server.client.get("/v1/models").status_code == 401
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    finally:
        server.stop()
