"""Body of POST /v1/responses, and its items as a conversation. Source: OpenAI's API reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field

from anychip.entrypoints.http.body import Parameters, Several, Strict
from anychip.entrypoints.openai.chat_protocol import MAX_MESSAGES, ContentPart, arguments_object, joined_text
from anychip.entrypoints.openai.protocol import StreamOptions, TextFormat
from anychip.entrypoints.serving import sampling_params
from anychip.entrypoints.turn import Tool, ToolChoice
from anychip.errors import InvalidRequest
from anychip.sampling_params import SamplingParams

Message = dict[str, Any]


class InputItem(Parameters):
    """A message, a call of the model's, or a call's result; told apart by `type`."""

    model_config = ConfigDict(extra="allow")

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Several[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Several[ContentPart] | None = None


class FunctionTool(Strict):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        """Raises InvalidRequest for tools that the server would have to run."""
        if self.type != "function":
            raise InvalidRequest(f"tools of type {self.type!r} are not run here; only functions are", param="tools")
        if self.name is None:
            raise InvalidRequest("a function tool has no name", param="tools")
        return Tool(name=self.name, description=self.description or "", parameters=self.parameters or {})


class ChosenFunction(Strict):
    type: Literal["function"]
    name: str


class TextOptions(Strict):
    format: TextFormat = TextFormat()
    verbosity: str | None = None


class ReasoningOptions(Strict):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesBody(Strict):
    model: str | None = None
    input: str | Several[InputItem] = Field(max_length=2**24)
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: Several[str] | None = None
    tools: Several[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, Any] | None = None
    background: Literal[False] | None = None
    service_tier: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    priority: int = 0
    cache_salt: str = ""
    seed: int | None = None
    deadline: float | None = None

    @property
    def wants_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())

    def choice(self) -> ToolChoice:
        parallel = self.parallel_tool_calls is not False
        if isinstance(self.tool_choice, ChosenFunction):
            return ToolChoice(mode="named", named=self.tool_choice.name, parallel=False)
        default: Literal["auto", "none"] = "auto" if self.tools else "none"
        return ToolChoice(mode=self.tool_choice or default, parallel=parallel)

    def sampling(self, defaults: Mapping[str, float]) -> SamplingParams:
        """Raises InvalidRequest."""
        return sampling_params(
            self,
            defaults,
            max_tokens=self.max_output_tokens,
            seed=self.seed,
            logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
            structured=None if self.text is None else self.text.format.structured(),
        )

    def messages(self) -> list[Message]:
        """The input as messages. Raises InvalidRequest."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        if len(self.input) > MAX_MESSAGES:
            raise InvalidRequest(f"{len(self.input)} input items, at most {MAX_MESSAGES}", param="input")
        return as_messages(self.input)


def as_messages(items: Sequence[InputItem]) -> list[Message]:
    """Raises InvalidRequest for items that are no text, call or result."""
    messages: list[Message] = []
    for item in items:
        if item.type == "message":
            if item.role is None:
                raise InvalidRequest("an input message has no role", param="input")
            messages.append({"role": item.role, "content": _text(item.content)})
        elif item.type == "function_call":
            arguments = arguments_object(item.arguments or "")
            call = {
                "id": item.call_id or "",
                "type": "function",
                "function": {"name": item.name or "", "arguments": arguments},
            }
            if messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif item.type == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.call_id or "", "content": _text(item.output)})
        elif item.type != "reasoning":  # what a model thought is not sent to it again
            raise InvalidRequest(f"input items of type {item.type[:40]!r} are not supported", param="input")
    return messages


def _text(content: str | list[ContentPart] | None) -> str:
    return joined_text(content, kinds=("input_text", "output_text", "text"), param="input")
