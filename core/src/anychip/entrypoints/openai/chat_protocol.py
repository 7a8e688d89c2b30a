"""Body of chat completions: messages, tools, and what they mean to a template."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import msgspec
from pydantic import ConfigDict, Field

from anychip.entrypoints.http.body import Parameters, Several, Strict
from anychip.entrypoints.openai.protocol import SamplingBody
from anychip.entrypoints.turn import Tool, ToolChoice
from anychip.errors import InvalidRequest

MAX_MESSAGES = 4096


class ContentPart(Parameters):
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
    content: str | Several[ContentPart] | None = None
    name: str | None = None
    tool_calls: Several[MessageToolCall] | None = None
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
        content = None if self.content is None else joined_text(self.content)
        message: dict[str, Any] = {"role": self.role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": arguments_object(call.function.arguments)},
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


def joined_text(
    content: str | list[ContentPart] | None, *, kinds: Collection[str] = ("text",), param: str = "messages"
) -> str:
    """Raises InvalidRequest for a part that is none of the `kinds` of text, and no refusal."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in kinds and part.type != "refusal":
            raise InvalidRequest(f"content of type {part.type[:40]!r}: the served model reads text only", param=param)
        if part.text is None and part.type in kinds:
            raise InvalidRequest("a text part has no text", param=param)
    return "".join(part.text or "" for part in content)


def arguments_object(arguments: str) -> Any:
    """Templates write arguments themselves, from objects."""
    try:
        return msgspec.json.decode(arguments.encode()) if arguments.strip() else {}
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
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
        return Tool(name=function.name, description=function.description or "", parameters=function.parameters or {})


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"] = "function"
    function: NamedFunction


class ChatBody(SamplingBody):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Several[ToolBody] | None = None
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
        return messages[:-1], messages[-1]["content"] or ""

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
