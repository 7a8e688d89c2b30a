"""One assistant turn, whatever API asked for it: the prompt is made and checked, the output is read for reasoning and
tool calls, and every API writes the same events in its own form."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import msgspec

from anychip.chat.events import Content, Event, OutputParser, Reasoning, ToolArguments, ToolStart
from anychip.chat.parsers.plain_json import ArgumentsOnly, ForcedCalls, JsonListTools
from anychip.chat.parsers.reasoning import PlainText
from anychip.chat.parsers.registry import ChosenParsers
from anychip.engine.input_processor import RequestOptions
from anychip.engine.outputs import RequestOutput, SequenceOutput
from anychip.errors import InvalidRequest
from anychip.launch.async_llm import AsyncLLM
from anychip.sampling_params import SamplingParams, StructuredOutput
from anychip.structured_output.schemas import with_every

MAX_TOOLS = 128
_NONE: Mapping[str, Any] = {"type": "object", "properties": {}}
_NAMES_NOTHING = {"type", "properties", "required", "title", "description", "$schema"}
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_CHARACTERS_EACH = 16
"""A message or tool takes as long to render as so many characters take to tokenize."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema. None, or an empty one: the function has no
    parameters."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None

    @property
    def schema(self) -> dict[str, Any]:
        """Of the arguments, for a grammar. One that names no properties allows none, or the grammar would make them
        up."""
        given = self.parameters or _NONE
        named_none = not given.get("properties") and given.keys() <= _NAMES_NOTHING
        return {**given, "type": "object", "additionalProperties": False} if named_none else dict(given)

    def for_template(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters or _NONE)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """`named`: the one function that must be called."""

    mode: Literal["none", "auto", "required", "named"] = "auto"
    named: str = ""
    parallel: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """`messages` are as templates take them: role, content, and tool_calls with arguments as objects."""

    messages: Sequence[Mapping[str, Any]]
    sampling: SamplingParams
    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice = ToolChoice()
    options: RequestOptions = field(default_factory=RequestOptions)
    add_generation_prompt: bool = True
    prefill: str = ""
    """How the answer begins already: the model continues it."""
    template_variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Piece:
    """New output of one of a turn's sequences, and what it means. `finish_reason` is the API's, once it has ended."""

    output: SequenceOutput
    events: list[Event]
    finish_reason: str | None
    request: RequestOutput

    @property
    def index(self) -> int:
        return self.output.index


@dataclass(slots=True)
class ToolCall:
    call_id: str
    name: str
    pieces: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)


class AnswerSoFar:
    """A sequence's events, put together when they are asked for."""

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []
        self._content: list[str] = []
        self._reasoning: list[str] = []

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    def add(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Content(text):
                    self._content.append(text)
                case Reasoning(text):
                    self._reasoning.append(text)
                case ToolStart(_, call_id, name):
                    self.calls.append(ToolCall(call_id, name))
                case ToolArguments(index, text):
                    self.calls[index].pieces.append(text)


class Turn:
    """Accepted: `pieces` runs it."""

    def __init__(
        self, request: TurnRequest, parsers: ChosenParsers, prompt: str, outputs: AsyncGenerator[RequestOutput]
    ) -> None:
        self.request = request
        self._parsers = parsers
        self._prompt = prompt
        self._outputs = outputs
        self._readers: dict[int, OutputParser] = {}
        self._answers: dict[int, AnswerSoFar] = {}

    @classmethod
    async def accept(cls, llm: AsyncLLM, parsers: ChosenParsers, request_id: str, request: TurnRequest) -> Turn:
        """Raises UserError for whatever cannot be."""
        check_tools(request.tools, request.tool_choice)
        prompt = await render(llm, request)
        sampling, options = request.sampling, request.options
        if (forced := _forced_calls(request)) is not None:
            if sampling.structured is not None:
                raise InvalidRequest("a forced tool call leaves no room for response_format", param="tool_choice")
            sampling = msgspec.structs.replace(sampling, structured=forced)
        if parsers.shows_special_tokens:
            sampling = msgspec.structs.replace(sampling, skip_special_tokens=False)
        # A model that calls before its reasoning ends would never come to a forced call: its grammar begins at once.
        if sampling.structured is not None and not (forced is not None and parsers.read_in_one):
            options = msgspec.structs.replace(options, structured_after=parsers.end_marker(prompt))
        # The template has written the special tokens.
        options = msgspec.structs.replace(options, add_special_tokens=False)
        return cls(request, parsers, prompt, await llm.accept(request_id, prompt, sampling, options))

    async def pieces(self) -> AsyncGenerator[Piece]:
        """The turn's output as it comes. Closing it early aborts the turn."""
        async with aclosing(self._outputs) as outputs:
            async for output in outputs:
                for sequence in output.outputs:
                    yield self._piece(output, sequence)

    def _piece(self, output: RequestOutput, sequence: SequenceOutput) -> Piece:
        index = sequence.index
        reader = self._readers.get(index)
        if reader is None:
            reader = self._readers[index] = self._reader()
        events = reader.feed(sequence.text) if sequence.text else []
        if sequence.finish_reason is not None:
            events += reader.finish()
        if not self.request.tool_choice.parallel:
            events = [e for e in events if not isinstance(e, ToolStart | ToolArguments) or e.index == 0]
        answer = self._answers.setdefault(index, AnswerSoFar())
        answer.add(events)
        reason: str | None = sequence.finish_reason
        if reason == "stop" and answer.calls:
            reason = "tool_calls"
        return Piece(sequence, events, reason, output)

    def answer(self, index: int) -> AnswerSoFar:
        """Everything that a sequence has said so far."""
        return self._answers.setdefault(index, AnswerSoFar())

    def _reader(self) -> OutputParser:
        choice, parsers = self.request.tool_choice, self._parsers
        calls: OutputParser = PlainText()
        if choice.mode == "named":
            calls = ArgumentsOnly(choice.named)
        elif choice.mode == "required":
            calls = ForcedCalls([tool.name for tool in self.request.tools])
        elif self.request.tools and choice.mode == "auto":
            calls = JsonListTools() if parsers.make_tools is None else parsers.make_tools()
        return parsers.reader(calls, self._prompt)


async def render(llm: AsyncLLM, request: TurnRequest) -> str:
    """The prompt of a turn. Raises InvalidRequest."""
    if llm.tokenizer is None:
        raise InvalidRequest("chat needs the tokenizer, which is off", param="messages")
    # No prompt is shorter than its messages, and few tokens cover more than 64 characters.
    characters = sum(len(str(message.get("content") or "")) for message in request.messages)
    if characters > 64 * llm.max_model_len:
        raise InvalidRequest(
            f"the messages have {characters} characters, far beyond a context of {llm.max_model_len} tokens",
            param="messages",
        )
    tools = [tool.for_template() for tool in request.tools] if request.tool_choice.mode != "none" else []
    rendered = partial(
        llm.tokenizer.apply_chat_template,
        request.messages,
        tools=tools,
        add_generation_prompt=request.add_generation_prompt,
        variables=request.template_variables,
    )
    characters += _CHARACTERS_EACH * (len(request.messages) + len(tools))
    return await llm.threads.run(characters, rendered) + request.prefill


def check_tools(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Raises InvalidRequest."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"{len(tools)} tools, at most {MAX_TOOLS}", param="tools")
    names = [tool.name for tool in tools]
    for name in names:
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"tool name {name[:80]!r} is not 1 to 64 letters, digits, dots, dashes or underscores", param="tools"
            )
    if len(set(names)) < len(names):
        raise InvalidRequest("two tools have the same name", param="tools")
    if choice.mode in ("required", "named") and not tools:
        raise InvalidRequest("tool_choice asks for a call, and there are no tools", param="tool_choice")
    if choice.mode == "named" and choice.named not in names:
        raise InvalidRequest(
            f"tool_choice names {choice.named!r}; the tools are {', '.join(names)}", param="tool_choice"
        )


def _forced_calls(request: TurnRequest) -> StructuredOutput | None:
    """The grammar of a call that must be; None where none must."""
    choice = request.tool_choice
    if choice.mode == "named":
        tool = next(tool for tool in request.tools if tool.name == choice.named)
        return StructuredOutput("json_schema", json.dumps(tool.schema))
    if choice.mode != "required":
        return None
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "maxItems": 8 if choice.parallel else 1,
        "items": {"anyOf": [_call_schema(tool) for tool in request.tools]},
        "$defs": {tool.name: _definition(tool) for tool in request.tools},
    }
    return StructuredOutput("json_schema", json.dumps(schema))


def _call_schema(tool: Tool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "parameters": {"$ref": f"#/$defs/{tool.name}"}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _definition(tool: Tool) -> dict[str, Any]:
    """A tool's schema where it stands among others: it refers to its own definitions, whatever those of others are
    called."""

    def placed(schema: dict[str, Any]) -> dict[str, Any]:
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#"):
            return schema
        return {**schema, "$ref": f"#/$defs/{tool.name}{reference[1:]}"}

    definition: dict[str, Any] = with_every(tool.schema, placed)
    return definition
