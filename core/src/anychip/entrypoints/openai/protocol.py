"""Bodies of completions and chat completions. Values are checked by SamplingParams.

Source: OpenAI's API reference; the extras (top_k, min_p, repetition_penalty, min_tokens, stop_token_ids,
allowed_token_ids, bad_words, ignore_eos, include_stop_str_in_output, prompt_logprobs, skip_special_tokens,
structured_outputs, truncate_prompt_tokens, use_beam_search, length_penalty, priority, cache_salt, return_token_ids,
request_id) are vLLM's; beam_width, early_stopping and deadline are anychip's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from anychip.entrypoints.http.body import Strict
from anychip.entrypoints.turn import Tool, ToolChoice
from anychip.errors import InvalidRequest
from anychip.sampling_params import GrammarKind, SamplingParams, StructuredOutput

TokenIds = list[Annotated[int, Field(strict=True)]]
MAX_MESSAGES = 4096


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class JsonSchemaFormat(Strict):
    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def structured(self) -> StructuredOutput | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutput("json_object")
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise InvalidRequest("response_format json_schema needs json_schema.schema", param="response_format")
        return StructuredOutput("json_schema", json.dumps(self.json_schema.schema_))


class StructuredOutputs(Strict):
    json_: dict[str, Any] | str | bool | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
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
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: list[str] | None = None
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

    def sampling(
        self, defaults: Mapping[str, float], *, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """`defaults` are the model's, for what the request leaves out. Raises InvalidRequest for a value out of
        range."""
        given = {name: value for name in _DEFAULTED if (value := getattr(self, name)) is not None}
        if self.top_k == -1:  # vLLM's word for no limit
            given["top_k"] = 0
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        beams = 0
        if self.use_beam_search or self.beam_width:
            if self.stream:
                raise InvalidRequest("beam search has no tokens until its end: it cannot stream", param="stream")
            beams = self.n if self.beam_width is None else self.beam_width
        return SamplingParams(
            **{**defaults, **given},
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


_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _token_keys(biases: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in biases.items()}
    except ValueError as error:
        raise InvalidRequest(f"logit_bias maps token ids to biases: {error}", param="logit_bias") from error


class CompletionBody(SamplingBody):
    prompt: str | TokenIds | list[str] | list[TokenIds]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool = False
    add_special_tokens: bool = True

    def prompts(self) -> list[str | list[int]]:
        """One or several, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        several = [item for item in self.prompt if not isinstance(item, int)]
        return [*several] if several else [ids]


# -- chat -------------------------------------------------------------------------------------------------


class ContentPart(BaseModel):
    """Text; anything else is refused by its name."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class FunctionCall(Strict):
    name: str
    arguments: str = "{}"


class MessageToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    audio: None = None
    annotations: list[Any] | None = None
    function_call: None = None

    def for_template(self) -> dict[str, Any]:
        """Raises InvalidRequest for content that is no text."""
        if self.content is None and self.role != "assistant":
            raise InvalidRequest(f"a {self.role} message has no content", param="messages")
        message: dict[str, Any] = {"role": self.role, "content": joined_text(self.content)}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": _object(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        if self.role == "tool":
            if self.tool_call_id is None:
                raise InvalidRequest("a tool message needs the tool_call_id that it answers", param="messages")
            message["tool_call_id"] = self.tool_call_id
        if (thought := self.reasoning_content or self.reasoning) is not None:
            message["reasoning_content"] = thought
        return message


def joined_text(content: str | list[ContentPart] | None) -> str:
    """Raises InvalidRequest for a part that is no text."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("text", "refusal"):
            raise InvalidRequest(
                f"content of type {part.type[:40]!r}: the served model reads text only", param="messages"
            )
        if part.text is None and part.type == "text":
            raise InvalidRequest("a text part has no text", param="messages")
    return "".join(part.text or "" for part in content)


def _object(arguments: str) -> Any:
    """Templates write arguments themselves, from objects."""
    try:
        return msgspec.json.decode(arguments.encode()) if arguments.strip() else {}
    except msgspec.DecodeError:
        return arguments


class FunctionBody(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Strict):
    type: Literal["function"]
    function: FunctionBody

    def tool(self) -> Tool:
        function = self.function
        if function.parameters is None:
            return Tool(name=function.name, description=function.description or "")
        return Tool(name=function.name, description=function.description or "", parameters=function.parameters)


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"] = "function"
    function: NamedFunction


class ChatBody(SamplingBody):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool = True
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None

    def conversation(self) -> tuple[list[dict[str, Any]], str]:
        """Messages as templates take them, and the beginning of the answer where the last message is continued.
        Raises InvalidRequest."""
        messages = [message.for_template() for message in self.messages]
        if not self.continue_final_message:
            return messages, ""
        if messages[-1]["role"] != "assistant" or len(messages) == 1:
            raise InvalidRequest(
                "continue_final_message: the last message is not the assistant's", param="continue_final_message"
            )
        return messages[:-1], messages[-1]["content"]

    def choice(self) -> ToolChoice:
        parallel = self.parallel_tool_calls is not False
        if isinstance(self.tool_choice, NamedTool):
            return ToolChoice(mode="named", named=self.tool_choice.function.name, parallel=False)
        default: Literal["auto", "none"] = "auto" if self.tools else "none"
        return ToolChoice(mode=self.tool_choice or default, parallel=parallel)

    def template_variables(self) -> dict[str, Any]:
        """Values for the operator's template; never names that it is given otherwise."""
        given = dict(self.chat_template_kwargs or {})
        reserved = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token"}
        if taken := sorted(reserved & set(given)):
            raise InvalidRequest(f"chat_template_kwargs may not set {taken[0]!r}", param="chat_template_kwargs")
        if self.reasoning_effort is not None:
            given["reasoning_effort"] = self.reasoning_effort
        return given
