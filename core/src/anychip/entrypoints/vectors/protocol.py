"""Bodies of requests for vectors, scores and labels.

Sources: OpenAI's API reference (embeddings); Jina's and Cohere's (rerank); Text Embeddings Inference's (/embed,
/rerank, /predict); the rest, and truncate_prompt_tokens, priority and normalize, have vLLM's names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import Field, StrictStr

from anychip.engine.vector_inputs import Text, TextPair, VectorAsk
from anychip.entrypoints.http.body import Several, Strict
from anychip.entrypoints.openai.protocol import TokenIds, with_ids_apart
from anychip.errors import InvalidRequest

MAX_INPUTS = 2048
"""Texts of one body. More are sent in several."""

Input = str | TokenIds | Several[StrictStr] | Several[TokenIds]


class VectorBody(Strict):
    """What all of them share."""

    model: str | None = None
    user: str | None = None
    truncate_prompt_tokens: int | None = None
    truncate: bool = False
    priority: int = 0
    deadline: float | None = None
    request_id: str | None = Field(default=None, min_length=1, max_length=128)

    def ask(self, **more: Any) -> VectorAsk:
        return VectorAsk(truncate=self.truncate, max_tokens=self.truncate_prompt_tokens, **more)


class _TextsBody(VectorBody):
    input: Input

    @classmethod
    def read(cls, raw: bytes) -> Self:
        return with_ids_apart(raw, "input", super().read)

    def texts(self) -> list[Text]:
        return listed_texts(self.input, "input")


class EmbeddingBody(_TextsBody):
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    normalize: bool | None = None
    prompt_name: str | None = None


class ClassifyBody(_TextsBody):
    activation: bool = True


class PoolingBody(_TextsBody):
    task: Literal["embed", "classify", "score", "reward", "token_embed", "token_classify"] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    normalize: bool | None = None
    activation: bool = True


class Document(Strict):
    text: str


class RerankBody(VectorBody):
    """Jina's and Cohere's form has `documents`, Text Embeddings Inference's has `texts`."""

    query: str
    documents: Several[str | Document] | None = None
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = True
    max_tokens_per_doc: int | None = Field(default=None, ge=1)
    texts: Several[str] | None = None
    raw_scores: bool = False
    return_text: bool = False
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None

    def found(self) -> list[str]:
        """Raises InvalidRequest for none of both, and for both."""
        if (self.documents is None) == (self.texts is None):
            raise InvalidRequest(
                "give documents or, in the form of Text Embeddings Inference, texts", param="documents"
            )
        given: Sequence[str | Document] = self.documents or self.texts or ()
        found = [each if isinstance(each, str) else each.text for each in given]
        check_count(found, "texts" if self.documents is None else "documents")
        return found


class ScoreBody(VectorBody):
    text_1: str | Several[str]
    text_2: str | Several[str]
    activation: bool = True

    def pairs(self) -> list[TextPair]:
        """One first text goes with all. Raises InvalidRequest."""
        seconds = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        firsts = [self.text_1] * len(seconds) if isinstance(self.text_1, str) else self.text_1
        if len(firsts) == 1:
            firsts = firsts * len(seconds)
        if len(firsts) != len(seconds):
            raise InvalidRequest(f"{len(firsts)} texts in text_1 and {len(seconds)} in text_2", param="text_2")
        check_count(seconds, "text_2")
        return [TextPair(one, other) for one, other in zip(firsts, seconds, strict=True)]


class TeiBody(VectorBody):
    inputs: Any
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None

    @property
    def left(self) -> bool | None:
        return None if self.truncation_direction is None else self.truncation_direction.lower() == "left"


class TeiEmbedBody(TeiBody):
    inputs: Input
    normalize: bool = True
    prompt_name: str | None = None
    dimensions: int | None = None

    @classmethod
    def read(cls, raw: bytes) -> Self:
        return with_ids_apart(raw, "inputs", super().read)

    def texts(self) -> list[Text]:
        return listed_texts(self.inputs, "inputs")


Sequences = Annotated[list[str], Field(min_length=1, max_length=2)]


class TeiPredictBody(TeiBody):
    """One text, one pair as a list of two texts, or a list of lists of one or two."""

    inputs: str | Sequences | Several[Sequences]
    raw_scores: bool = False

    def texts(self) -> list[Text]:
        if isinstance(self.inputs, str):
            return [self.inputs]
        if self.inputs and isinstance(self.inputs[0], str):
            return [_one_or_pair(self.inputs)]
        check_count(self.inputs, "inputs")
        return [_one_or_pair(each) for each in self.inputs]

    @property
    def several(self) -> bool:
        return bool(self.inputs) and not isinstance(self.inputs, str) and not isinstance(self.inputs[0], str)


def _one_or_pair(texts: Any) -> Text:
    return texts[0] if len(texts) == 1 else TextPair(*texts)


def listed_texts(given: Any, param: str) -> list[Text]:
    """One text, one list of ids, or several of either. Raises InvalidRequest for none, and for too many."""
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [msgspec.convert(given, list[int])]
    check_count(given, param)
    return list(given)


def check_count(given: Sequence[object], param: str) -> None:
    """Raises InvalidRequest."""
    if not given:
        raise InvalidRequest(f"{param} is empty", param=param)
    if len(given) > MAX_INPUTS:
        raise InvalidRequest(
            f"{param} holds {len(given)} texts, at most {MAX_INPUTS} may be in one request; send them in parts",
            param=param,
        )
