"""Body of completions, and what chat completions share with it. Values are checked by SamplingParams.

Source: OpenAI's API reference; the extras (top_k, min_p, repetition_penalty, min_tokens, stop_token_ids,
allowed_token_ids, bad_words, ignore_eos, include_stop_str_in_output, prompt_logprobs, skip_special_tokens,
structured_outputs, truncate_prompt_tokens, use_beam_search, length_penalty, priority, cache_salt, return_token_ids,
request_id) are vLLM's; beam_width, early_stopping and deadline are anychip's.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar, cast

import msgspec
from pydantic import Field

from anychip.entrypoints.http.body import LONG_BODY, Several, Strict
from anychip.entrypoints.serving import sampling_params
from anychip.errors import InvalidRequest
from anychip.sampling_params import GrammarKind, SamplingParams, StructuredOutput

T = TypeVar("T")
TokenIds = Several[Annotated[int, Field(strict=True)]]


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class JsonSchemaFormat(Strict):
    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextFormat(JsonSchemaFormat):
    """The Responses API's form, with the schema beside the type."""

    type: Literal["text", "json_object", "json_schema"] = "text"

    def structured(self) -> StructuredOutput | None:
        """Raises InvalidRequest for a schema that is not there."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutput("json_object")
        if self.schema_ is None:
            raise InvalidRequest("text.format json_schema has no schema", param="text")
        return StructuredOutput("json_schema", json.dumps(self.schema_))


class ResponseFormat(Strict):
    """Chat's form, with the schema one level below."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def structured(self) -> StructuredOutput | None:
        """Raises InvalidRequest for a schema that is not there."""
        schema = None if self.json_schema is None else self.json_schema.schema_
        if self.type == "json_schema" and schema is None:
            raise InvalidRequest("response_format json_schema needs json_schema.schema", param="response_format")
        return TextFormat(type=self.type, schema=schema).structured()


class StructuredOutputs(Strict):
    json_: dict[str, Any] | str | bool | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Several[str] | None = None
    grammar: str | None = None

    def structured(self) -> StructuredOutput | None:
        """Raises InvalidRequest for more than one."""
        found: list[tuple[GrammarKind, str]] = []
        if self.json_ is not None:
            found.append(("json_schema", self.json_ if isinstance(self.json_, str) else json.dumps(self.json_)))
        if self.json_object:
            found.append(("json_object", ""))
        if self.regex is not None:
            found.append(("regex", self.regex))
        if self.choice is not None:
            found.append(("choice", json.dumps(self.choice)))
        if self.grammar is not None:
            found.append(("grammar", self.grammar))
        if len(found) > 1:
            raise InvalidRequest("structured_outputs takes one of its kinds", param="structured_outputs")
        return StructuredOutput(*found[0]) if found else None


class SamplingBody(Strict):
    """What completions and chat share."""

    model: str | None = None
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    min_tokens: int = 0
    stop: str | Several[str] | None = None
    stop_token_ids: TokenIds | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Several[str] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None
    use_beam_search: bool = False
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    truncate_prompt_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = 0
    cache_salt: str = ""
    return_token_ids: bool = False
    request_id: str | None = Field(default=None, min_length=1, max_length=128)
    deadline: float | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    def sampling(
        self, defaults: Mapping[str, float], *, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """`defaults` are the model's, for what the request leaves out. Raises InvalidRequest for a value out of
        range."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        beams = 0
        if self.use_beam_search or self.beam_width:
            if self.stream:
                raise InvalidRequest("beam search has no tokens until its end: it cannot stream", param="stream")
            beams = self.n if self.beam_width is None else self.beam_width
        return sampling_params(
            self,
            defaults,
            n=self.n,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=_token_keys(self.logit_bias or {}),
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            bad_words=tuple(self.bad_words or ()),
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
            skip_special_tokens=self.skip_special_tokens,
            structured=self._structured(),
            beam_width=beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
        )

    def _structured(self) -> StructuredOutput | None:
        asked = None if self.structured_outputs is None else self.structured_outputs.structured()
        form = None if self.response_format is None else self.response_format.structured()
        if asked is not None and form is not None:
            raise InvalidRequest("response_format and structured_outputs exclude each other", param="response_format")
        return asked or form

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


def _token_keys(biases: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in biases.items()}
    except ValueError as error:
        raise InvalidRequest(f"logit_bias maps token ids to biases: {error}", param="logit_bias") from error


class CompletionBody(SamplingBody):
    prompt: str | TokenIds | Several[str] | Several[TokenIds]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool = False
    add_special_tokens: bool = True

    @classmethod
    def read(cls, raw: bytes) -> Self:
        return with_ids_apart(raw, "prompt", super().read)

    def prompts(self) -> Sequence[str | list[int]]:
        """One or several, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and not isinstance(self.prompt[0], int):
            return self.prompt
        return [cast(list[int], self.prompt)]


def with_ids_apart(raw: bytes, name: str, read: Callable[[bytes], T]) -> T:
    """`read` of a body whose field `name` may hold token ids. In a long body those are most of it, and are read apart:
    pydantic would hold up every other thread meanwhile. Raises ValidationError, and InvalidRequest for a field that is
    no list of ids."""
    fields = _fields(raw) if len(raw) > LONG_BODY else {}
    begin = _IDS.match(fields.get(name, b""))
    if begin is None:
        return read(raw)
    kind: Any = list[int] if begin["several"] is None else list[list[int]]
    time.sleep(0)  # to the other threads, before and after each long call
    try:
        ids = msgspec.json.decode(fields[name], type=kind)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"{name}: {error}", param=name) from None
    time.sleep(0)
    body = read(msgspec.json.encode(fields | {name: msgspec.Raw(b"[]")}))
    setattr(body, name, ids)
    return body


_IDS = re.compile(rb"\s*\[\s*(?P<several>\[\s*)?-?[0-9]")
"""How a list of token ids, or of several prompts' ids, begins."""


def _fields(raw: bytes) -> dict[str, msgspec.Raw]:
    """A JSON object's values, not read yet; {} for what is none."""
    try:
        return msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    except msgspec.MsgspecError:
        return {}
