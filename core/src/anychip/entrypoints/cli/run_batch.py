"""`anychip run-batch`: a file of requests in, a file of answers out, in OpenAI's batch format, without a server."""

from __future__ import annotations

import argparse
import asyncio
import sys
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import msgspec

from anychip.entrypoints.cli.options import add_engine_options, engine_config
from anychip.entrypoints.http.answer import Answer
from anychip.entrypoints.http.body import checked
from anychip.entrypoints.http.errors import response_of
from anychip.entrypoints.http.long_json import encoded
from anychip.entrypoints.openai.chat import accept_chat
from anychip.entrypoints.openai.chat_protocol import ChatBody
from anychip.entrypoints.openai.completions import accept_completion
from anychip.entrypoints.openai.protocol import CompletionBody
from anychip.entrypoints.serving import Caller, Serving
from anychip.entrypoints.vectors.answers import accept_embeddings
from anychip.entrypoints.vectors.protocol import EmbeddingBody
from anychip.environment import Environment
from anychip.errors import AnychipError, ConfigError
from anychip.launch.async_llm import AsyncLLM
from anychip.server_config import ServerConfig

_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


def add_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    parser.add_argument("-i", "--input-file", required=True, help="one request a line; - is standard input")
    parser.add_argument(
        "-o", "--output-file", required=True, help="one answer a line, as they come; - is standard output"
    )
    parser.add_argument("--concurrency", type=int, default=256, help="requests that run at once")
    add_engine_options(parser, environment)


def run(arguments: argparse.Namespace) -> int:
    """0 when every request was answered, 1 when some were refused."""
    if arguments.concurrency < 1:
        raise ConfigError(f"concurrency is {arguments.concurrency}; expected 1 or more")
    lines = _read(arguments.input_file)
    failed = asyncio.run(_run(AsyncLLM(engine_config(arguments)), lines, arguments.output_file, arguments.concurrency))
    print(f"{len(lines) - failed} of {len(lines)} requests answered", file=sys.stderr)
    return 1 if failed else 0


class BatchLine(msgspec.Struct):
    """One request: `url` is a route of the server."""

    custom_id: str
    body: msgspec.Raw
    url: str = "/v1/chat/completions"
    method: str = "POST"


def _read(name: str) -> list[BatchLine]:
    """Raises ConfigError for a file that is none, before anything is loaded."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read: {error}") from error
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):  # texts may hold what else ends a line
        if not line.strip():
            continue
        try:
            fields = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
            given = {name: value for name, value in fields.items() if bytes(value) != b"null"}
            request = msgspec.json.decode(msgspec.json.encode(given), type=BatchLine)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{name}:{number} is no batch request: {error}") from error
        if request.url not in _ROUTES or request.method != "POST":
            raise ConfigError(
                f"{name}:{number} asks for {request.method} {request.url}; POST {', '.join(_ROUTES)} are served"
            )
        lines.append(request)
    return lines


async def _run(llm: AsyncLLM, lines: Sequence[BatchLine], output: str, concurrency: int) -> int:
    """How many requests were refused."""
    await llm.start()
    try:
        serving = Serving.of(llm, ServerConfig())
        with nullcontext(sys.stdout) if output == "-" else open(output, "w") as file:
            return await _answer_all(serving, lines, file, concurrency)
    finally:
        await llm.close()


async def _answer_all(serving: Serving, lines: Sequence[BatchLine], file: TextIO, concurrency: int) -> int:
    room, failed = asyncio.Semaphore(concurrency), 0

    async def one(line: BatchLine) -> tuple[BatchLine, int, Any]:
        async with room:
            try:
                answer = await _accept(serving, line)
                return line, 200, await answer.whole()
            except AnychipError as error:
                refused = response_of(line.url, error)
                return line, refused.status_code, msgspec.json.decode(refused.body)

    for done in asyncio.as_completed([asyncio.create_task(one(line)) for line in lines]):
        line, status, body = await done
        failed += status != 200
        file.write(b"".join(encoded(_line(line, status, body))).decode() + "\n")
        file.flush()
    return failed


async def _accept(serving: Serving, line: BatchLine) -> Answer:
    if line.url == "/v1/completions":
        completion = checked(bytes(line.body), CompletionBody)
        completion.stream = False
        return await accept_completion(serving, completion, Caller())
    if line.url == "/v1/embeddings":
        return accept_embeddings(serving, checked(bytes(line.body), EmbeddingBody), Caller())
    chat = checked(bytes(line.body), ChatBody)
    chat.stream = False
    return await accept_chat(serving, chat, Caller())


def _line(line: BatchLine, status: int, body: Any) -> dict[str, Any]:
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": uuid.uuid4().hex, "body": body},
        "error": None if status == 200 else body["error"],
    }
