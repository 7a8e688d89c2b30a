"""Runs a body's prompts through the engine and shapes what comes back, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import msgspec

from anychip.engine.output_processor import merge
from anychip.engine.outputs import RequestOutput, SequenceOutput
from anychip.entrypoints.openai.protocol import ChatBody, CompletionBody
from anychip.entrypoints.openai.responses import Reply, error_body, usage
from anychip.errors import AnychipError, InvalidRequest
from anychip.launch.async_llm import AsyncLLM

Json = dict[str, object]
Streams = Sequence[AsyncIterator[RequestOutput]]


@dataclass(slots=True, kw_only=True)
class Generation:
    """One HTTP request's engine requests, already accepted, and how to answer."""

    reply: Reply
    streams: Streams
    per_prompt: int
    include_usage: bool
    chat: bool

    async def whole(self) -> Json:
        """The response once everything has ended."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_collect(stream)) for stream in self.streams]
        finals = [task.result() for task in tasks]
        choices, generated = [], 0
        shape: Callable[[int, SequenceOutput], Json]
        shape = self.reply.chat_choice if self.chat else self.reply.completion_choice
        for number, final in enumerate(finals):
            for output in final.outputs:
                choices.append(shape(number * self.per_prompt + output.index, output))
                generated += len(output.token_ids)
        return self.reply.whole(choices, usage(finals, generated))

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events; an error after the first one is an event too, since the status is gone."""
        seen: set[int] = set()
        last: dict[int, RequestOutput] = {}
        generated = 0
        try:
            async for number, piece in _interleave(self.streams):
                last[number] = piece
                for output in piece.outputs:
                    index = number * self.per_prompt + output.index
                    generated += len(output.token_ids)
                    yield _event(self.reply.whole([self._piece(index, output, first=index not in seen)], None))
                    seen.add(index)
            if self.include_usage:
                yield _event(self.reply.whole([], usage(list(last.values()), generated)))
        except AnychipError as error:
            yield _event(error_body(str(error), kind="server_error", param=None, code=None))
        yield b"data: [DONE]\n\n"

    def _piece(self, index: int, output: SequenceOutput, *, first: bool) -> Json:
        if self.chat:
            return self.reply.chat_delta(index, output, first=first)
        return self.reply.completion_choice(index, output)


def start_completion(llm: AsyncLLM, body: CompletionBody) -> Generation:
    """Checks everything before anything is sent. Raises UserError."""
    sampling = body.sampling(llm.sampling_defaults, max_tokens=body.max_tokens, logprobs=body.logprobs)
    reply_id = f"cmpl-{uuid.uuid4().hex}"
    streams = [
        llm.generate(
            f"{reply_id}-{number}",
            prompt,
            sampling,
            priority=body.priority,
            cache_salt=body.cache_salt,
            add_special_tokens=body.add_special_tokens,
        )
        for number, prompt in enumerate(body.prompts())
    ]
    return Generation(
        reply=_reply(llm, reply_id, "text_completion"),
        streams=streams,
        per_prompt=sampling.n,
        include_usage=body.include_usage,
        chat=False,
    )


def start_chat(llm: AsyncLLM, body: ChatBody) -> Generation:
    """Checks everything before anything is sent. Raises UserError."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    sampling = body.sampling(
        llm.sampling_defaults,
        max_tokens=body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    prompt = llm.chat_prompt([message.for_template() for message in body.messages])
    reply_id = f"chatcmpl-{uuid.uuid4().hex}"
    stream = llm.generate(
        reply_id,
        prompt,
        sampling,
        priority=body.priority,
        cache_salt=body.cache_salt,
        add_special_tokens=False,  # the template has written them
    )
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    return Generation(
        reply=_reply(llm, reply_id, kind),
        streams=[stream],
        per_prompt=sampling.n,
        include_usage=body.include_usage,
        chat=True,
    )


def _reply(llm: AsyncLLM, reply_id: str, kind: str) -> Reply:
    return Reply(reply_id=reply_id, kind=kind, model=llm.config.public_name, tokenizer=llm.tokenizer)


async def _collect(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    pieces = []
    async for piece in stream:
        pieces.append(piece)
    return merge(pieces)


async def _interleave(streams: Streams) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Pieces of all streams as they come, each with its stream's number."""
    queue: asyncio.Queue[tuple[int, RequestOutput] | AnychipError | None] = asyncio.Queue()

    async def pump(number: int, stream: AsyncIterator[RequestOutput]) -> None:
        try:
            async for piece in stream:
                queue.put_nowait((number, piece))
            queue.put_nowait(None)
        except AnychipError as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, AnychipError):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _event(content: Json) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
