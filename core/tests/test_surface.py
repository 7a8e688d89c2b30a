"""Parameters and routes as their users meet them, and what is refused: by name, with a reason."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from served import CHAT, Server, events


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server("--device", "cpu", "--kv-cache-bytes", "32M", "--dtype", "float32")
    yield running
    assert running.stop() == 0


PLAIN = {"prompt": "def f(x):\n    return", "temperature": 0}


def complete(server: Server, **body: object) -> dict:
    answer = server.post(
        "/v1/completions", {"prompt": "def f(x):\n    return", "temperature": 0, "max_tokens": 6} | body
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


# -- parameters -------------------------------------------------------------------------------------------


def test_penalties_biases_and_words_change_what_comes(server):
    plain = complete(server)["choices"][0]["text"]
    assert complete(server, presence_penalty=0.0, repetition_penalty=1.0, frequency_penalty=0.0)["choices"][0]["text"]
    assert complete(server, logit_bias={"77": 100}, return_token_ids=True)["choices"][0]["token_ids"] == [77] * 6
    ids = complete(server, allowed_token_ids=[5, 6], return_token_ids=True)["choices"][0]["token_ids"]
    assert set(ids) <= {5, 6}
    first = complete(server, logprobs=0)["choices"][0]["logprobs"]["tokens"][0]
    assert complete(server, logprobs=0, bad_words=[first])["choices"][0]["logprobs"]["tokens"][0] != first
    assert complete(server, bad_words=["never said"])["choices"][0]["text"] == plain


def test_echo_scores_the_prompt_whole_and_streamed(server):
    body = {"echo": True, "logprobs": 1, "max_tokens": 2}
    whole = complete(server, **body)["choices"][0]
    chunks = events(server.post("/v1/completions", PLAIN | {"stream": True} | body))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    streamed = [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["tokens"]]
    assert streamed == whole["logprobs"]["tokens"]
    offsets = [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"]
    scored = complete(server, echo=True, logprobs=1, max_tokens=0)
    assert scored["choices"][0]["text"] == "def f(x):\n    return" and scored["usage"]["completion_tokens"] == 0
    assert scored["choices"][0]["logprobs"]["token_logprobs"] == whole["logprobs"]["token_logprobs"][:-2]
    prompt = complete(server, prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    assert prompt[0] is None and all("logprob" in next(iter(entry.values())) for entry in prompt[1:])


def test_stops_beams_truncation_and_ids(server):
    kept = complete(server, stop=["x"], include_stop_str_in_output=True)["choices"][0]
    cut = complete(server, stop=["x"])["choices"][0]
    assert (kept["text"], kept["stop_reason"]) == (cut["text"] + "x", "x")
    token = complete(server, max_tokens=1, return_token_ids=True)["choices"][0]["token_ids"][0]
    assert complete(server, stop_token_ids=[token])["choices"][0]["stop_reason"] == token
    beams = complete(server, use_beam_search=True, n=3)["choices"]
    assert len({beam["text"] for beam in beams}) == 3
    short = complete(server, prompt=[5] * 3000, truncate_prompt_tokens=10)
    assert short["usage"]["prompt_tokens"] == 10
    assert complete(server, prompt=[5] * 3000, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 2048 - 6
    assert complete(server, request_id="abc")["id"] == "cmpl-abc"


def test_usage_goes_along_with_a_stream_when_asked(server):
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chunks = events(server.post("/v1/chat/completions", CHAT | options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks if "usage" in chunk][-1] == 8
    assert chunks[0]["usage"]["completion_tokens"] >= 1


@pytest.mark.parametrize(
    ("asked", "check"),
    [
        ({"choice": ["red", "green"]}, lambda text: text in ("red", "green")),
        ({"regex": "[0-9]{3}"}, lambda text: len(text) == 3 and text.isdigit()),
        ({"grammar": 'start: "x" | "yy"'}, lambda text: text in ("x", "yy")),
        ({"json": {"type": "integer", "maximum": 9, "minimum": 0}}, lambda text: 0 <= json.loads(text) <= 9),
    ],
)
def test_structured_outputs(server, asked, check):
    body = CHAT | {"structured_outputs": asked, "max_tokens": 40}
    assert check(server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"])


def test_continue_final_message_goes_on_where_the_assistant_stopped(server):
    messages = [*CHAT["messages"], {"role": "assistant", "content": "You call reversed(", "tool_calls": None}]
    body = CHAT | {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    assert server.post("/v1/chat/completions", body).status_code == 200


def test_tokens_go_there_and_back(server):
    there = server.post("/tokenize", {"prompt": "def f(x):", "return_token_strs": True}).json()
    assert there["count"] == len(there["tokens"]) == len(there["token_strs"])
    assert server.post("/detokenize", {"tokens": there["tokens"]}).json()["prompt"] == "def f(x):"
    chat = server.post("/tokenize", {"messages": CHAT["messages"]}).json()
    assert chat["count"] == server.post("/v1/chat/completions", CHAT).json()["usage"]["prompt_tokens"]


# -- refusals ---------------------------------------------------------------------------------------------

IMAGE = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("route", "body", "status", "expected"),
    [
        ("completions", {"prompt": "x", "suffix": "y"}, 400, "parameter 'suffix' is not supported: "),
        ("completions", {"prompt": "x", "best_of": 3}, 400, "parameter 'best_of' is not supported"),
        ("completions", {"prompt": "x", "guided_json": {}}, 400, "use structured_outputs.json or response_format"),
        ("completions", {"prompt": "x", "n": 10**9}, 400, "n is 1000000000; expected 1 to 128"),
        ("completions", {"prompt": "x", "logprobs": 10**6}, 400, "logprobs is 1000000; expected 0 to 20"),
        ("completions", {"prompt": ["x"] * 1000}, 400, "1000 prompts, at most 256"),
        ("completions", {"prompt": "x", "max_tokens": 0}, 400, "goes with echo or prompt_logprobs"),
        ("completions", {"prompt": "x", "logit_bias": {"9999": 1}}, 400, "logit_bias holds 9999"),
        ("completions", {"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias maps token ids"),
        ("completions", {"prompt": "x", "beam_width": 4, "stream": True}, 400, "cannot stream"),
        ("completions", {"prompt": "x", "beam_width": 99}, 400, "beam_width is 99"),
        ("completions", {"prompt": "x", "structured_outputs": {"regex": "a", "choice": ["b"]}}, 400, "one of"),
        ("completions", {"prompt": "x", "structured_outputs": {"regex": "("}}, 400, "regex cannot be followed"),
        ("completions", {"prompt": "x", "structured_outputs": {"json": {"if": {}}}}, 400, 'keys: ["if"]'),
        ("completions", {"prompt": "\ud800"}, 400, "not JSON"),
        ("chat/completions", CHAT | {"chat_template": "{{ 1 }}"}, 400, "the operator chooses it"),
        ("chat/completions", CHAT | {"chat_template_kwargs": {"messages": "x"}}, 400, "may not set 'messages'"),
        ("chat/completions", {"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "'image_url': the served"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "has no text"),
        ("chat/completions", {"messages": [{"role": "user", "content": None}]}, 400, "has no content"),
        ("chat/completions", {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role"),
        ("chat/completions", {"messages": CHAT["messages"] * 10_000}, 400, "at most 4096 items"),
        ("chat/completions", {"messages": CHAT["messages"] * 4000}, 400, "context of 2048"),
        ("chat/completions", CHAT | {"tools": [TOOL], "tool_choice": {"function": {"name": "g"}}}, 400,
         "tool_choice names 'g'; the tools are f"),
        ("chat/completions", CHAT | {"tool_choice": "required"}, 400, "there are no tools"),
        ("chat/completions", CHAT | {"tools": [TOOL, TOOL]}, 400, "two tools have the same name"),
        ("chat/completions", CHAT | {"tools": [TOOL | {"function": {"name": "a b"}}]}, 400, "tool name 'a b'"),
        ("chat/completions", CHAT | {"response_format": {"type": "json_schema"}}, 400, "needs json_schema.schema"),
        ("responses", {"input": []}, 400, "input is empty"),
        ("responses", {"input": "x", "previous_response_id": "resp_none"}, 404, "is not stored here"),
        ("responses", {"input": "x", "tools": [{"type": "web_search"}]}, 400, "only functions are"),
        ("responses", {"input": [{"type": "item_reference", "id": "x"}]}, 400, "'item_reference' are not supported"),
        ("messages", {"model": "quickstart", "messages": CHAT["messages"]}, 400, "max_tokens"),
        ("messages", {"model": "gpt", "max_tokens": 1, "messages": CHAT["messages"]}, 404, "does not exist"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_reason(server, route, body, status, expected):
    raw = json.dumps(body)
    answer = server.client.post(f"/v1/{route}", content=raw)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert expected in error["message"], error["message"]
    assert error["type"] in ("invalid_request_error", "not_found_error")


def test_an_enormous_body_is_refused_before_it_is_read(server):
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")

    def endless() -> Iterator[bytes]:
        for _ in range(1600):
            yield b"x" * 2**16

    with contextlib.suppress(httpx.TransportError):  # it has answered and closed while more was being sent
        assert server.client.post("/v1/completions", content=endless()).status_code == 413
    assert server.client.get("/health").status_code == 200


def test_a_flood_of_headers_is_refused(server):
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\n" + b"".join(b"x-%d: y\r\n" % i for i in range(20_000)) + b"\r\n")
        assert raw.recv(100)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431")
    assert server.client.get("/health").status_code == 200


# -- keys, admin, TLS, sockets ----------------------------------------------------------------------------


def make_key(name: str) -> tuple[str, str]:
    command = [sys.executable, "-m", "anychip.entrypoints.cli.main", "hash-key", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr.strip().rpartition(" ")[2], done.stdout


def test_keys_from_a_file_admit_limit_and_separate(tmp_path):
    (alice, line_a), (bob, line_b) = make_key("alice"), make_key("bob")
    keys = tmp_path / "keys"
    keys.write_text("# who may\n" + line_a + line_b)
    assert alice not in keys.read_text()
    server = Server("--device", "cpu", "--kv-cache-bytes", "32M", "--api-keys", str(keys), "--key-concurrency", "1")
    try:
        assert server.post("/v1/chat/completions", CHAT).status_code == 401
        assert server.client.get("/v1/models", headers={"authorization": "Bearer nobody"}).status_code == 401
        assert server.client.get("/debug/state").status_code == 401
        assert server.client.get("/metrics").status_code == 200
        as_alice, as_bob = {"authorization": f"Bearer {alice}"}, {"x-api-key": bob}
        kept = server.post("/v1/responses", {"input": "x", "max_output_tokens": 2}, headers=as_alice).json()
        assert server.client.get(f"/v1/responses/{kept['id']}", headers=as_alice).status_code == 200
        assert server.client.get(f"/v1/responses/{kept['id']}", headers=as_bob).status_code == 404
        long = {"prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=long, headers=as_alice) as stream:
            next(stream.iter_lines())
            assert server.post("/v1/chat/completions", CHAT, headers=as_bob).status_code == 200
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize("content", ["alice:short\n", "alice\n", "", "a:" + "0" * 64 + "\na:" + "1" * 64 + "\n"])
def test_a_file_that_holds_no_keys_stops_the_start(tmp_path, content):
    keys = tmp_path / "keys"
    keys.write_text(content)
    server = Server("--device", "cpu", "--kv-cache-bytes", "32M", "--api-keys", str(keys), wait=False)
    assert server.process.wait(60) == 2
    assert "keys" in server.log() and "Traceback" not in server.log()


def test_admin_routes_have_their_own_port_and_key():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server("--device", "cpu", "--kv-cache-bytes", "32M", "--admin-port", str(port), "--admin-key", "root")
    try:
        assert server.client.post("/admin/drain").status_code == 404
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as admin:
            assert admin.post("/admin/drain").status_code == 404
            assert admin.get("/admin/requests", headers={"authorization": "Bearer wrong"}).status_code == 404
            admin.headers["authorization"] = "Bearer root"
            assert admin.get("/admin/requests").json() == {"open": [], "waiting": 0}
            assert admin.post("/admin/log-level", json={"level": "warning"}).json() == {"level": "warning"}
            assert admin.post("/admin/log-level", json={"level": "loud"}).status_code == 400
            before = server.engine_pid()
            assert admin.post("/admin/restart-engine").status_code == 200
            server.wait_until_ready()
            assert server.engine_pid() != before
            long = {"prompt": "x", "max_tokens": 1900, "ignore_eos": True, "stream": True, "request_id": "big", "n": 8}
            with server.client.stream("POST", "/v1/completions", json=long) as stream:
                lines = stream.iter_lines()
                next(lines)
                (running,) = admin.get("/admin/requests").json()["open"]
                assert admin.post(f"/admin/abort/{running}").json() == {"aborted": True}
                assert any("was aborted" in line for line in lines)
            assert admin.post("/admin/drain").json()["draining"]
        assert server.process.wait(20) == 0
    finally:
        server.process.kill()


def test_an_admin_port_without_a_key_is_refused():
    server = Server("--device", "cpu", "--admin-port", "1", wait=False)
    assert server.process.wait(60) == 2 and "takes an --admin-key" in server.log()


def test_a_unix_socket_serves_and_is_removed(tmp_path):
    path = tmp_path / "sock"
    server = Server("--device", "cpu", "--kv-cache-bytes", "32M", "--uds", str(path), wait=False)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x", timeout=30) as client:
        for _ in range(200):
            try:
                assert client.get("/health").status_code == 200
                break
            except httpx.TransportError:
                server.process.poll()
                time.sleep(0.1)
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        assert Path(path).stat().st_mode & 0o077 == 0
    assert server.stop() == 0
    assert not path.exists()


def test_tls(tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    server = Server(
        "--device", "cpu", "--kv-cache-bytes", "32M", "--tls-cert", str(cert), "--tls-key", str(key), wait=False
    )
    with httpx.Client(base_url=f"https://127.0.0.1:{server.port}", verify=False, timeout=30) as client:
        for _ in range(200):
            try:
                assert client.get("/health").status_code == 200
                break
            except httpx.TransportError:
                assert server.process.poll() is None, server.log()
                time.sleep(0.1)
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert server.stop() == 0


def test_cors_is_closed_until_it_is_opened(server):
    assert "access-control-allow-origin" not in server.client.get("/version", headers={"origin": "http://a.b"}).headers
    opened = Server("--device", "cpu", "--kv-cache-bytes", "32M", "--cors-origin", "http://a.b", "--lenient")
    try:
        allowed = opened.client.get("/version", headers={"origin": "http://a.b"}).headers
        assert allowed["access-control-allow-origin"] == "http://a.b"
        assert (
            "access-control-allow-origin" not in opened.client.get("/version", headers={"origin": "http://c.d"}).headers
        )
        # And lenient: what is unknown is ignored, wherever it stands, and said.
        body = CHAT | {"made_up": 1, "stream_options": {"what": 2}}
        assert opened.post("/v1/chat/completions", body).status_code == 200
        assert "ignored: " in opened.log() and "made_up" in opened.log()
        assert opened.post("/v1/chat/completions", CHAT | {"made_up": 1, "n": 0}).status_code == 400
    finally:
        assert opened.stop() == 0
