"""From a body to a response, for each API that returns vectors, scores or labels. Nothing streams."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np

from anychip.engine.vector_inputs import TextPair
from anychip.engine.vector_outputs import activated, check_dimensions, classified, cut, ranked
from anychip.entrypoints.http.long_json import LongList, listed
from anychip.entrypoints.serving import Caller, Serving
from anychip.entrypoints.vectors.protocol import (
    ClassifyBody,
    EmbeddingBody,
    PoolingBody,
    RerankBody,
    ScoreBody,
    TeiEmbedBody,
    TeiPredictBody,
)
from anychip.entrypoints.vectors.running import Found, VectorAnswer, begin, check_task, usage
from anychip.errors import AnychipError, InvalidRequest
from anychip.tasks.served import Task

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """http.answer.Answer: `make` turns what was found into the response."""

    run: VectorAnswer
    make: Callable[[list[Found]], Coroutine[Any, Any, Any]]

    async def whole(self) -> Any:
        return await self.make(await self.run.found())

    def events(self) -> AsyncGenerator[bytes]:
        raise InvalidRequest("vectors do not stream", param="stream")

    def failure(self, error: AnychipError) -> list[bytes]:
        return []


def _head(serving: Serving, run: VectorAnswer) -> Json:
    return {"id": run.reply_id, "object": "list", "created": int(time.time()), "model": serving.model}


def _shown(vector: np.ndarray, form: str) -> Any:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


async def _entries(found: list[Found], entry: Callable[[int, Found], Any]) -> list[Any] | LongList:
    return await listed((entry(index, each) for index, each in enumerate(found)), len(found))


def accept_embeddings(serving: Serving, body: EmbeddingBody, caller: Caller) -> Answer:
    """POST /v1/embeddings. Raises UserError."""
    serving.check_model(body.model)
    check_task(serving, "embeddings", "embed")
    served = serving.llm.served
    check_dimensions(served, body.dimensions)
    normalize = served.normalize if body.normalize is None else body.normalize
    ask = body.ask(normalize=body.normalize, prompt_name=body.prompt_name)
    run = begin(serving, body, caller, body.texts(), ask, "embd")

    async def make(found: list[Found]) -> Json:
        def entry(index: int, each: Found) -> Json:
            vector = cut(each.vector, body.dimensions, normalize=normalize)
            return {"object": "embedding", "index": index, "embedding": _shown(vector, body.encoding_format)}

        return {**_head(serving, run), "data": await _entries(found, entry), "usage": usage(found)}

    return Answer(run, make)


def accept_tei_embed(serving: Serving, body: TeiEmbedBody, caller: Caller) -> Answer:
    """POST /embed. Raises UserError."""
    check_task(serving, "embeddings", "embed")
    check_dimensions(serving.llm.served, body.dimensions)
    ask = body.ask(normalize=body.normalize, prompt_name=body.prompt_name, left=body.left, param="inputs")
    run = begin(serving, body, caller, body.texts(), ask, "embd")

    async def make(found: list[Found]) -> Any:
        return await _entries(
            found, lambda _, each: cut(each.vector, body.dimensions, normalize=body.normalize).tolist()
        )

    return Answer(run, make)


def accept_classify(serving: Serving, body: ClassifyBody, caller: Caller) -> Answer:
    """POST /classify. Raises UserError."""
    serving.check_model(body.model)
    check_task(serving, "labels", "classify", "score", "reward")
    run = begin(serving, body, caller, body.texts(), body.ask(), "classify")

    async def make(found: list[Found]) -> Json:
        def entry(index: int, each: Found) -> Json:
            result = classified(serving.llm.served, each.vector, raw=not body.activation)
            probs = result.scores.tolist()
            return {"index": index, "label": result.label, "probs": probs, "num_classes": len(probs)}

        return {**_head(serving, run), "data": await _entries(found, entry), "usage": usage(found)}

    return Answer(run, make)


def accept_predict(serving: Serving, body: TeiPredictBody, caller: Caller) -> Answer:
    """POST /predict. Raises UserError."""
    check_task(serving, "labels", "classify", "score", "reward")
    run = begin(serving, body, caller, body.texts(), body.ask(left=body.left, param="inputs"), "predict")

    async def make(found: list[Found]) -> Any:
        served = serving.llm.served

        def entry(index: int, each: Found) -> list[Json]:
            scores = classified(served, each.vector, raw=body.raw_scores).scores.tolist()
            labels = [{"score": score, "label": label} for score, label in zip(scores, served.labels, strict=True)]
            return sorted(labels, key=lambda one: -one["score"])

        return await _entries(found, entry) if body.several else entry(0, found[0])

    return Answer(run, make)


def accept_pooling(serving: Serving, body: PoolingBody, caller: Caller) -> Answer:
    """POST /pooling: what the model gives, whichever task it serves. Raises UserError."""
    serving.check_model(body.model)
    tasks: tuple[Task, ...] = ("embed", "classify", "score", "reward")
    if body.task is not None and body.task != serving.llm.served.task:
        check_task(serving, body.task)
    check_task(serving, "vectors", *tasks)
    served = serving.llm.served
    if served.task == "embed":
        check_dimensions(served, body.dimensions)
    elif body.dimensions is not None:
        raise InvalidRequest(f"dimensions are of vectors, and the task is {served.task}", param="dimensions")
    normalize = served.normalize if body.normalize is None else body.normalize
    run = begin(serving, body, caller, body.texts(), body.ask(normalize=normalize), "pool")

    async def make(found: list[Found]) -> Json:
        def entry(index: int, each: Found) -> Json:
            if served.task == "embed":
                vector = cut(each.vector, body.dimensions, normalize=normalize)
            else:
                vector = classified(served, each.vector, raw=not body.activation).scores
            return {"object": "pooling", "index": index, "data": _shown(vector, body.encoding_format)}

        return {**_head(serving, run), "data": await _entries(found, entry), "usage": usage(found)}

    return Answer(run, make)


def accept_score(serving: Serving, body: ScoreBody, caller: Caller) -> Answer:
    """POST /score. Raises UserError."""
    serving.check_model(body.model)
    check_task(serving, "scores", "score")
    run = begin(serving, body, caller, body.pairs(), body.ask(param="text_2"), "score")

    async def make(found: list[Found]) -> Json:
        def entry(index: int, each: Found) -> Json:
            return {"object": "score", "index": index, "score": _score(serving, each, raw=not body.activation)}

        return {**_head(serving, run), "data": await _entries(found, entry), "usage": usage(found)}

    return Answer(run, make)


def accept_rerank(serving: Serving, body: RerankBody, caller: Caller, *, cohere: bool = False) -> Answer:
    """POST /rerank, /v1/rerank and, as `cohere`, /v2/rerank. Raises UserError."""
    serving.check_model(body.model)
    check_task(serving, "a rerank", "score")
    documents = body.found()
    param = "texts" if body.documents is None else "documents"
    left = None if body.truncation_direction is None else body.truncation_direction.lower() == "left"
    # Cohere cuts documents by itself; the others' users say whether.
    truncate = body.truncate or cohere or body.max_tokens_per_doc is not None
    ask = body.ask(left=left, param=param)
    if truncate and not ask.truncate:
        ask = type(ask)(truncate=True, max_tokens=ask.max_tokens, left=left, param=param)
    run = begin(serving, body, caller, [TextPair(body.query, each) for each in documents], ask, "rerank")

    async def make(found: list[Found]) -> Any:
        best = ranked([_score(serving, each, raw=body.raw_scores) for each in found], body.top_n)
        if body.documents is None:
            return [
                {
                    "index": each.index,
                    "score": each.score,
                    **({"text": documents[each.index]} if body.return_text else {}),
                }
                for each in best
            ]
        results: list[Json] = [{"index": each.index, "relevance_score": each.score} for each in best]
        if cohere:
            meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
            return {"id": run.reply_id, "results": results, "meta": meta}
        if body.return_documents:
            results = [{**each, "document": {"text": documents[each["index"]]}} for each in results]
        return {"id": run.reply_id, "model": serving.model, "results": results, "usage": usage(found)}

    return Answer(run, make)


def _score(serving: Serving, found: Found, *, raw: bool) -> float:
    return float((found.vector if raw else activated(found.vector, serving.llm.served.activation))[0])
