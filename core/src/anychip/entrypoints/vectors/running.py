"""Runs the texts of one request, a few at a time, and gives their vectors in order."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np

from anychip.engine.vector_inputs import Text, TextPair, VectorAsk
from anychip.entrypoints.serving import Caller, Serving
from anychip.entrypoints.vectors.protocol import VectorBody
from anychip.errors import InvalidRequest
from anychip.sampling_params import SamplingParams
from anychip.tasks.detect import refusal
from anychip.tasks.served import Task

IN_FLIGHT = 128
"""Texts of one request that the engine has at once: a long list leaves the queue to others."""

_SAMPLING = SamplingParams()


@dataclass(frozen=True, slots=True)
class Found:
    """A text's vector, float32, and its tokens."""

    vector: np.ndarray
    num_tokens: int


@dataclass(slots=True, kw_only=True)
class VectorAnswer:
    """What http.answer.Answer's `whole` asks for; `made` turns the vectors into the response."""

    serving: Serving
    body: VectorBody
    caller: Caller
    texts: Sequence[Text]
    ask: VectorAsk
    reply_id: str

    async def found(self) -> list[Found]:
        """Raises what ended a text; the others end with it."""
        found: list[Found | None] = [None] * len(self.texts)
        numbered = iter(enumerate(self.texts))
        workers = [asyncio.create_task(self._run(numbered, found)) for _ in range(min(IN_FLIGHT, len(self.texts)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [each for each in found if each is not None]

    async def _run(self, numbered: Iterator[tuple[int, Text]], found: list[Found | None]) -> None:
        serving, body = self.serving, self.body
        llm = serving.llm
        for number, text in numbered:
            try:
                prompt = await llm.threads.run(_size(text), llm.vectors.prompt, text, self.ask)
                options = serving.options(self.caller, body.deadline, priority=body.priority, extras=prompt.extras)
                stream = await llm.accept(f"{self.reply_id}-{number}", prompt.token_ids, _SAMPLING, options)
                async with aclosing(stream) as pieces:
                    async for piece in pieces:
                        assert piece.vector is not None, "a request for a vector ends with one"
                        vector = np.frombuffer(piece.vector, dtype=np.float32)
                        found[number] = Found(vector, len(piece.prompt_token_ids))
            except InvalidRequest as error:
                if len(self.texts) > 1:
                    raise type(error)(f"text {number}: {error}", param=error.param) from None
                raise


def _size(text: Text) -> int:
    return sum(map(len, text)) if isinstance(text, TextPair) else len(text)


def begin(
    serving: Serving, body: VectorBody, caller: Caller, texts: Sequence[Text], ask: VectorAsk, kind: str
) -> VectorAnswer:
    """`kind` is the beginning of the response's id."""
    reply_id = f"{kind}-{body.request_id or uuid.uuid4().hex}"
    return VectorAnswer(serving=serving, body=body, caller=caller, texts=texts, ask=ask, reply_id=reply_id)


def check_task(serving: Serving, asked: str, *tasks: Task) -> None:
    """Raises InvalidRequest where the model serves none of the tasks."""
    served = serving.llm.served
    if served.task not in tasks:
        raise InvalidRequest(refusal(served, asked), param="model")


def usage(found: Sequence[Found]) -> dict[str, Any]:
    count = sum(each.num_tokens for each in found)
    return {"prompt_tokens": count, "total_tokens": count}
