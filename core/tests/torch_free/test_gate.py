"""The door: keys and what they may have open, bodies on their way in, methods, labels, the log."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import zlib

import httpx
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from served_kit import ScriptedLLM, with_client
from starlette.responses import StreamingResponse

from anychip.entrypoints.http import connection, incoming
from anychip.entrypoints.http.connection import Connection
from anychip.entrypoints.http.incoming import Incoming
from anychip.entrypoints.http.keys import Keys, given_key, hashed
from anychip.errors import BodyTooLarge, ConfigError, InvalidRequest, RequestTimeout
from anychip.server_config import ServerConfig

STREAMS = [
    ("/v1/completions", {"prompt": "x"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ("/v1/responses", {"input": "x"}),
    ("/v1/messages", {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}),
]


@pytest.mark.parametrize(("path", "body"), STREAMS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_key_has_no_more_open_than_it_may_until_the_last_byte(path, body, stream):
    llm = ScriptedLLM("abc", gap=0.02)

    async def ask(client: httpx.AsyncClient) -> list[int]:
        async def one() -> int:
            return (await client.post(path, json=body | {"stream": stream})).status_code

        first = asyncio.create_task(one())
        await asyncio.sleep(0.01)
        others = await asyncio.gather(one(), one())
        return [await first, *others, await one()]

    config = ServerConfig(key_concurrency=1, api_key="k")
    assert with_client(llm, ask, config, authorization="Bearer k") == [200, 429, 429, 200]
    assert llm.most_open == 1


def test_a_client_that_leaves_a_stream_gives_its_place_back():
    llm = ScriptedLLM("a" * 100, gap=0.001)
    config = ServerConfig(key_concurrency=1, api_key="k")
    raw = json.dumps({"prompt": "x", "stream": True}).encode()
    messages = [{"type": "http.request", "body": raw, "more_body": False}]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"", "query_string": b"",
        "headers": [(b"x-api-key", b"k")], "http_version": "1.1", "scheme": "http", "server": ("x", 1),
        "client": ("y", 2), "root_path": "", "asgi": {"version": "3.0", "spec_version": "2.3"},
    }  # fmt: skip

    async def leaves(client: httpx.AsyncClient) -> int:
        begun = asyncio.Event()

        async def receive() -> dict:
            if messages:
                return messages.pop()
            await begun.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            if message.get("body"):
                begun.set()

        await client._transport.app(scope, receive, send)
        return (await client.post("/v1/completions", json={"prompt": "x"})).status_code

    assert with_client(llm, leaves, config, authorization="Bearer k") == 200
    assert llm.open == 0


def test_looking_up_is_not_counted():
    llm = ScriptedLLM("abc", gap=0.02)

    async def ask(client: httpx.AsyncClient) -> int:
        busy = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x"}))
        await asyncio.sleep(0.01)
        found = (await client.get("/v1/models")).status_code
        await busy
        return found

    config = ServerConfig(key_concurrency=1, api_key="k")
    assert with_client(llm, ask, config, authorization="Bearer k") == 200


# -- keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["api_key", "admin_key"])
@pytest.mark.parametrize("key", ["", " ", "\t\n", "secret\n", " secret"])
def test_a_key_that_is_no_key_stops_the_start(name, key):
    with pytest.raises(ConfigError, match=f"{name} .*ANYCHIP_{name.upper()}"):
        ServerConfig(**{name: key})


def test_the_hash_of_an_empty_key_is_no_key(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"alice:{hashed('')}\n")
    with pytest.raises(ConfigError, match="hash of an empty key"):
        Keys.of(None, str(file), None)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Z"]), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_a_key_of_any_letters_opens_in_either_header(key):
    keys, raw = Keys.of(key, None, None), key.encode()
    assert keys.tenant(given_key({b"authorization": b"Bearer " + raw})) == "default"
    assert keys.tenant(given_key({b"x-api-key": raw})) == "default"
    assert keys.tenant(given_key({b"x-api-key": raw + b"?"})) is None


# -- bodies -----------------------------------------------------------------------------------------------


def arriving(pieces: list[bytes]):
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages[-1]["more_body"] = False
    left = iter([*messages, {"type": "http.disconnect"}])

    async def receive() -> dict:
        return next(left)

    return receive


def read(pieces: list[bytes], *, max_bytes: int = 1 << 20, encoding: str | None = None) -> bytes:
    async def run() -> bytes:
        receive = Incoming(arriving(pieces), max_bytes=max_bytes, encoding=encoding)
        body, more = b"", True
        while more:
            message = await receive()
            assert message["type"] == "http.request"
            body, more = body + message["body"], message["more_body"]
        assert (await receive())["type"] == "http.disconnect"
        return body

    return asyncio.run(run())


def packed(body: bytes, form: str) -> bytes:
    if form == "members":
        return gzip.compress(body[: len(body) // 2]) + gzip.compress(body[len(body) // 2 :])
    if form == "raw":
        packer = zlib.compressobj(wbits=-15)
        return packer.compress(body) + packer.flush()
    return {"gzip": gzip.compress, "zlib": zlib.compress, "plain": bytes}[form](body)


FORMS = {"plain": None, "gzip": "gzip", "members": "gzip", "zlib": "deflate", "raw": "deflate"}


@given(
    st.one_of(st.binary(max_size=300), st.integers(0, 300_000).map(bytes)),
    st.sampled_from(sorted(FORMS)), st.integers(1, 70_000),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_body_is_what_was_packed_whatever_its_form_and_chunks(body, form, size):
    data = packed(body, form)
    step = max(size, len(data) // 50)
    pieces = [data[at : at + step] for at in range(0, len(data), step)] or [b""]
    assert read(pieces, encoding=FORMS[form]) == body


def test_a_bomb_counts_as_what_it_unpacks_to():
    bomb = gzip.compress(bytes(50_000_000))
    assert len(bomb) < 60_000
    with pytest.raises(BodyTooLarge, match="longer than 1000000 bytes"):
        read([bomb], max_bytes=1_000_000, encoding="gzip")


@pytest.mark.parametrize(
    "data", [b"{}", gzip.compress(b"{}" * 500)[:-9], gzip.compress(b"{}") + b"rest"], ids=["plain", "cut", "followed"]
)
def test_what_is_not_in_its_encoding_is_refused(data):
    with pytest.raises(InvalidRequest, match="not gzip, as its Content-Encoding says"):
        read([data], encoding="gzip")


def test_a_body_that_trickles_is_given_up(monkeypatch):
    monkeypatch.setattr(incoming, "_FIRST_S", 0.01)

    async def run() -> None:
        async def never() -> dict:
            await asyncio.sleep(60)
            raise AssertionError

        await Incoming(never, max_bytes=10, encoding=None)()

    with pytest.raises(RequestTimeout, match="0 bytes of the body"):
        asyncio.run(run())


def test_packed_requests_are_answered_and_unknown_encodings_named():
    raw = json.dumps({"prompt": "x"}).encode()

    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [
            await client.post("/v1/completions", content=data, headers={"content-encoding": encoding})
            for data, encoding in (
                (gzip.compress(raw), "gzip"), (zlib.compress(raw), "deflate"), (raw, "identity"), (raw, "gzip"),
                (raw, "br"), (raw, "gzip, gzip"),
            )
        ]  # fmt: skip

    answers = with_client(ScriptedLLM(), ask)
    assert [answer.status_code for answer in answers] == [200, 200, 200, 400, 415, 415]
    assert "'br' is not read; send gzip, deflate" in answers[4].json()["error"]["message"]
    assert answers[4].headers["accept-encoding"] == "gzip, deflate"


# -- connections ------------------------------------------------------------------------------------------


async def served_over_sockets(app, use) -> None:
    """`use` gets the port of a server with our connections."""
    config = uvicorn.Config(
        app, http=Connection, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        await asyncio.wait_for(use(server.servers[0].sockets[0].getsockname()[1]), 10)
    finally:
        server.should_exit = True
        await running


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("sent", [b"", b"GET /", b"GET / HTTP/1.1\r\nhost: x\r\n"])
def test_a_head_that_never_ends_is_not_waited_for(monkeypatch, before, sent):
    monkeypatch.setattr(connection, "HEAD_S", 0.05)

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def waits(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(before):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        writer.write(sent or b"G" * before)
        with contextlib.suppress(ConnectionResetError):  # it is not closed politely
            assert await reader.read() == b""
        writer.close()

    asyncio.run(served_over_sockets(app, waits))


def test_an_answer_that_nobody_takes_ends_its_request(monkeypatch):
    monkeypatch.setattr(connection, "UNREAD_S", 0.05)
    ended = []

    async def app(scope, receive, send) -> None:
        async def body():
            try:
                while True:
                    yield bytes(2**20)
                    await asyncio.sleep(0)  # as a model's answer does: nothing else runs before
            finally:
                ended.append(True)

        await StreamingResponse(body())(scope, receive, send)

    async def never_reads(port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.transport.pause_reading()
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        while not ended:
            await asyncio.sleep(0.01)
        writer.transport.abort()

    asyncio.run(served_over_sockets(app, never_reads))
    assert ended == [True]


# -- methods, labels, the log -----------------------------------------------------------------------------


def test_head_is_answered_wherever_get_is():
    paths = ["/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/m", "/", "/openapi.json"]

    async def ask(client: httpx.AsyncClient) -> list[tuple[httpx.Response, httpx.Response]]:
        return [(await client.get(path), await client.head(path)) for path in paths]

    for got, head in with_client(ScriptedLLM(), ask):
        assert head.status_code == got.status_code == 200 and head.content == b""
        assert head.headers.get("content-type") == got.headers.get("content-type")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/chat/completions", "OPTIONS, POST"),
        ("/v1/responses/resp_1", "DELETE, GET, HEAD, OPTIONS"),
        ("/health", "GET, HEAD, OPTIONS"),
    ],
)
def test_options_and_refused_methods_tell_what_a_path_answers_to(path, allowed):
    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.options(path), await client.put(path, headers={"x-api-key": "k"})]

    options, put = with_client(ScriptedLLM(), ask, ServerConfig(api_key="k"))
    assert options.status_code == 204 and put.status_code == 405
    assert options.headers["allow"] == put.headers["allow"] == allowed


def test_a_browsers_sdk_passes_the_preflight_and_reads_when_to_come_again():
    asked = {
        "origin": "http://page", "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang,x-stainless-retry-count",
    }  # fmt: skip

    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        preflight = await client.options("/v1/chat/completions", headers=asked)
        return [preflight, await client.get("/v1/models", headers={"origin": "http://page"})]

    preflight, answer = with_client(ScriptedLLM(), ask, ServerConfig(cors_origins=("http://page",)))
    assert preflight.status_code == 200
    assert "x-stainless-retry-count" in preflight.headers["access-control-allow-headers"]
    assert {"retry-after", "x-request-id"} <= set(answer.headers["access-control-expose-headers"].split(", "))


def test_a_client_invents_no_series_and_no_lines(caplog):
    llm = ScriptedLLM()

    async def ask(client: httpx.AsyncClient) -> None:
        await client.post("/v1/completions", json={"prompt": "x"})
        for number in range(30):
            await client.request(f"M{number}", f"/v1/{number}")
            await client.get(f"/v1/models/{number}?{number}")
            await client.get(f"/v1/responses/{number}", headers={"x-request-id": f"{number}\x01"})
        await client.get("/v1/%0aINFO forged%0d" + "x" * 5000)

    with caplog.at_level(logging.INFO, "anychip.http"):
        with_client(llm, ask)
    counted = [line for line in llm.metrics.render().decode().splitlines() if "http_requests_total{" in line]
    assert len(counted) == 5
    lines = [record.getMessage() for record in caplog.records]
    assert all("\n" not in line and len(line) < 300 for line in lines)
    assert any("\\nINFO forged" in line for line in lines)
