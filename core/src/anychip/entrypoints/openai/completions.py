"""POST /v1/completions: prompts as texts or ids, several at once, with echo and log-probabilities."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec

from anychip.engine.output_processor import merge
from anychip.engine.outputs import RequestOutput, SequenceOutput
from anychip.entrypoints.http.answer import long_sse, sse
from anychip.entrypoints.openai.protocol import CompletionBody
from anychip.entrypoints.openai.responses import STREAM_END, Json, Reply, TextOffsets, failed_stream, usage
from anychip.entrypoints.serving import Caller, Serving
from anychip.errors import AnychipError, InvalidRequest
from anychip.sampling_params import SamplingParams
from anychip.step_messages import TokenLogprobs

Streams = Sequence[AsyncGenerator[RequestOutput]]
MAX_PROMPTS = 256


@dataclass(slots=True)
class _Progress:
    """What a stream has sent of one choice."""

    offsets: TextOffsets
    begun: bool = False


@dataclass(slots=True, kw_only=True)
class CompletionAnswer:
    """http.answer.Answer of the prompts of one body."""

    body: CompletionBody
    reply: Reply
    streams: Streams
    per_prompt: int
    empty: bool
    """max_tokens 0: the prompt is scored, and what was generated to get there is dropped."""
    progress: dict[int, _Progress] = field(default_factory=dict)

    async def whole(self) -> Json:
        tasks = [asyncio.create_task(_collect(stream)) for stream in self.streams]
        try:
            finals = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        choices = [
            await self._choice(number, final, output) for number, final in enumerate(finals) for output in final.outputs
        ]
        generated = 0 if self.empty else sum(len(o.token_ids) for final in finals for o in final.outputs)
        return self.reply.whole(choices, usage(finals, generated))

    async def events(self) -> AsyncGenerator[bytes]:
        last: dict[int, RequestOutput] = {}
        generated = 0
        async with aclosing(_interleave(self.streams)) as pieces:
            async for number, piece in pieces:
                last[number] = piece
                for output in piece.outputs:
                    generated += 0 if self.empty else len(output.token_ids)
                    usages = usage(list(last.values()), generated) if self.body.continuous_usage else None
                    choice = await self._choice(number, piece, output)
                    for part in long_sse(self.reply.whole([choice], usages)):
                        yield part
        if self.body.include_usage:
            yield sse(self.reply.whole([], usage(list(last.values()), generated)))
        yield STREAM_END

    def failure(self, error: AnychipError) -> list[bytes]:
        return failed_stream(error)

    async def _choice(self, number: int, piece: RequestOutput, output: SequenceOutput) -> Json:
        index = number * self.per_prompt + output.index
        progress = self.progress.get(index)
        if progress is None:
            skips = self.body.skip_special_tokens
            offsets = TextOffsets(self.reply.tokenizer, skip_special_tokens=skips)
            progress = self.progress[index] = _Progress(offsets)
        if self.empty:
            output = SequenceOutput(index=output.index, logprobs=None, finish_reason="length")
            if self.body.logprobs is not None:
                output.logprobs = []
        echoes = self.body.echo and not progress.begun
        logprobs = await self._logprobs(piece if echoes else None, output, progress.offsets)
        choice = self.reply.completion_choice(index, output, logprobs)
        if not progress.begun:
            progress.begun = True
            if echoes:
                choice["text"] = self._prompt_text(piece) + choice["text"]
            if self.body.prompt_logprobs is not None and piece.prompt_logprobs is not None:
                choice["prompt_logprobs"] = await self.reply.prompt_logprobs(piece)
            if self.body.return_token_ids:
                choice["prompt_token_ids"] = piece.prompt_token_ids
        return choice

    def _prompt_text(self, piece: RequestOutput) -> str:
        if self.reply.tokenizer is None:
            return ""
        return self.reply.tokenizer.decode(piece.prompt_token_ids, skip_special_tokens=self.body.skip_special_tokens)

    async def _logprobs(
        self, echoed: RequestOutput | None, output: SequenceOutput, offsets: TextOffsets
    ) -> Json | None:
        """Of the prompt's tokens where it is echoed, and of the answer's; None where nobody asked."""
        ids: list[int] = []
        scored: list[TokenLogprobs | None] = []
        if echoed is not None and self.body.logprobs is not None:
            ids += echoed.prompt_token_ids
            scored += [None, *(echoed.prompt_logprobs or [])][: len(ids)]
        elif output.logprobs is None:
            return None
        if output.logprobs is not None:
            ids += output.token_ids
            scored += output.logprobs
        return await self.reply.completion_logprobs(ids, scored, offsets)


async def accept_completion(serving: Serving, body: CompletionBody, caller: Caller) -> CompletionAnswer:
    """Checks everything before anything runs. Raises UserError."""
    asked = serving.check_model(body.model)
    serving.check_draws()
    prompts = body.prompts()
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequest(f"{len(prompts)} prompts, at most {MAX_PROMPTS} in one request", param="prompt")
    sampling = _sampling(serving, body)
    options = serving.options(
        caller,
        body.deadline,
        priority=body.priority,
        cache_salt=body.cache_salt,
        add_special_tokens=body.add_special_tokens,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        adapter=asked.adapter,
    )
    reply_id = f"cmpl-{body.request_id or uuid.uuid4().hex}"
    streams = [
        await serving.llm.accept(
            f"{reply_id}-{number}",
            prompt,
            sampling,
            options,
        )
        for number, prompt in enumerate(prompts)
    ]
    return CompletionAnswer(
        body=body,
        reply=Reply(
            reply_id=reply_id,
            kind="text_completion",
            model=asked.name,
            tokenizer=serving.llm.tokenizer,
            return_token_ids=body.return_token_ids,
        ),
        streams=streams,
        per_prompt=sampling.n,
        empty=body.max_tokens == 0,
    )


def _sampling(serving: Serving, body: CompletionBody) -> SamplingParams:
    if body.max_tokens == 0 and not (body.echo or body.prompt_logprobs is not None):
        raise InvalidRequest("max_tokens 0 generates nothing; it goes with echo or prompt_logprobs", param="max_tokens")
    sampling = body.sampling(
        serving.llm.sampling_defaults, max_tokens=1 if body.max_tokens == 0 else body.max_tokens, logprobs=body.logprobs
    )
    if body.echo and body.logprobs is not None and sampling.prompt_logprobs is None:
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=body.logprobs)
    return sampling


async def _collect(stream: AsyncGenerator[RequestOutput]) -> RequestOutput:
    async with aclosing(stream):
        return merge([piece async for piece in stream])


async def _interleave(streams: Streams) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """Pieces of all streams as they come, each with its stream's number."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for piece in stream:
                yield 0, piece
        return
    # One piece of each stream waits here, however slow the reader is: what comes meanwhile is merged where it is made.
    queue: asyncio.Queue[tuple[int, RequestOutput] | AnychipError | None] = asyncio.Queue()
    room = [asyncio.Semaphore(1) for _ in streams]

    async def pump(number: int, stream: AsyncGenerator[RequestOutput]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    await room[number].acquire()
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
                room[item[0]].release()
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
