"""Bodies of /v1/messages, and what they mean as a conversation. Source: Anthropic's API reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from pydantic import ConfigDict, Field

from anychip.entrypoints.http.body import Parameters, Several, Strict
from anychip.entrypoints.openai.chat_protocol import MAX_MESSAGES
from anychip.entrypoints.serving import sampling_params
from anychip.entrypoints.turn import Tool, ToolChoice
from anychip.errors import InvalidRequest
from anychip.sampling_params import SamplingParams

Message = dict[str, Any]


class Block(Parameters):
    """A piece of content; told apart by `type`."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | Several[Block] | None = None


class MessageBody(Strict):
    role: Literal["user", "assistant", "system"]
    content: str | Several[Block]


class ToolBody(Parameters):
    """A function of the client's. Tools that the server would run have a type, and are refused."""

    model_config = ConfigDict(extra="allow")

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None

    def tool(self) -> Tool:
        if self.type not in (None, "custom") or self.input_schema is None:
            raise InvalidRequest(f"tool {self.name[:64]!r} is not run here; only client tools are", param="tools")
        return Tool(name=self.name, description=self.description or "", parameters=self.input_schema)


class ToolChoiceBody(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    def choice(self) -> ToolChoice:
        parallel = not self.disable_parallel_tool_use
        if self.type == "tool":
            return ToolChoice(mode="named", named=self.name or "", parallel=False)
        modes: dict[str, Literal["auto", "required", "none"]]
        modes = {"auto": "auto", "any": "required", "none": "none"}
        return ToolChoice(mode=modes[self.type], parallel=parallel)


class ConversationBody(Strict):
    """What counting tokens and creating a message share."""

    model: str
    messages: list[MessageBody] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    system: str | Several[Block] | None = None
    tools: Several[ToolBody] | None = None
    tool_choice: ToolChoiceBody | None = None
    thinking: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None

    def choice(self) -> ToolChoice:
        return (
            ToolChoice(mode="auto" if self.tools else "none") if self.tool_choice is None else self.tool_choice.choice()
        )

    def conversation(self) -> tuple[list[Message], str]:
        """Messages as templates take them, and the beginning of the answer if the last message is the assistant's.
        Raises InvalidRequest for content that is no text."""
        messages: list[Message] = []
        if self.system is not None:
            messages.append({"role": "system", "content": _text(self.system)})
        for body in self.messages:
            messages += _messages(body)
        prefill = ""
        if len(messages) > 1 and messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
            prefill = messages.pop()["content"].rstrip()
        return messages, prefill


class CountTokensBody(ConversationBody):
    pass


class MessagesBody(ConversationBody):
    max_tokens: int
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: Several[str] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None

    def sampling(self, defaults: Mapping[str, float]) -> SamplingParams:
        """Raises InvalidRequest."""
        return sampling_params(self, defaults, max_tokens=self.max_tokens, stop=tuple(self.stop_sequences or ()))


def _messages(body: MessageBody) -> list[Message]:
    """One message of theirs may be several of a template's: results of tools are messages of their own."""
    if isinstance(body.content, str):
        return [{"role": body.role, "content": body.content}]
    results: list[Message] = []
    message: Message = {"role": body.role, "content": ""}
    for block in body.content:
        if block.type == "text":
            message["content"] += block.text or ""
        elif block.type == "tool_use":
            function = {"name": block.name or "", "arguments": block.input or {}}
            message.setdefault("tool_calls", []).append(
                {"id": block.id or "", "type": "function", "function": function}
            )
        elif block.type == "tool_result":
            content = "" if block.content is None else _text(block.content)
            results.append({"role": "tool", "tool_call_id": block.tool_use_id or "", "content": content})
        elif block.type == "thinking":
            message["reasoning_content"] = message.get("reasoning_content", "") + (block.thinking or "")
        elif block.type != "redacted_thinking":
            raise _unreadable(block)
    if message["content"] or "tool_calls" in message or not results:
        if not message["content"] and "tool_calls" in message:
            message["content"] = None  # as templates know a message of calls alone
        results.append(message)
    return results


def _text(content: str | list[Block]) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text":
            raise _unreadable(block)
    return "".join(block.text or "" for block in content)


def _unreadable(block: Block) -> InvalidRequest:
    return InvalidRequest(f"content of type {block.type[:40]!r}: the served model reads text only", param="messages")


def parsed_arguments(text: str) -> dict[str, Any]:
    """A call's arguments as an object; what is none stands under a name of its own."""
    try:
        value = msgspec.json.decode((text or "{}").encode())
        msgspec.json.encode(value)  # not every number that can be read can be written
    except (msgspec.MsgspecError, OverflowError, RecursionError):
        return {"_unparsed": text}
    return value if isinstance(value, dict) else {"value": value}
