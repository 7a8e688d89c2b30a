"""Builds a response out of a turn's events, and the stream of events that tells of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from anychip.chat.events import Content, Event, Reasoning, ToolArguments, ToolStart
from anychip.engine.outputs import RequestOutput
from anychip.entrypoints.http.long_json import GrowingList
from anychip.entrypoints.openai.chat_protocol import arguments_object
from anychip.entrypoints.openai.stateful.protocol import ResponsesBody

Json = dict[str, Any]


class ResponseBuilder:
    """One item is open at a time: reasoning, a message, or a call. Every event has its number."""

    def __init__(self, body: ResponsesBody, model: str) -> None:
        self.response_id = f"resp_{uuid.uuid4().hex}"
        self.output: list[Json] = []
        self._number = 0
        self._open: Json | None = None
        self._text = ""
        self._logprobs = GrowingList()  # of the open message, an entry for each token, where they were asked for
        self._pending = GrowingList()  # of tokens that no text has come of so far
        self._pending_told = False
        self._fields = {
            "id": self.response_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": body.instructions,
            "previous_response_id": body.previous_response_id,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_logprobs": body.top_logprobs,
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            "tool_choice": _choice(body),
            "text": _text_options(body),
            "reasoning": body.reasoning.model_dump(exclude_none=True) if body.reasoning else None,
            "truncation": body.truncation or "disabled",
            "store": body.store is not False,
            "service_tier": "default",
            "background": False,
            "user": body.user,
        }

    # -- the response -------------------------------------------------------------------------------------

    def response(self, status: str, *, usage: Json | None = None, error: Json | None = None) -> Json:
        """As it stands."""
        why = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._fields,
            "status": status,
            "output": [dict(item) for item in self.output],
            "usage": usage,
            "error": error,
            "incomplete_details": why,
        }

    def message(self) -> Json:
        """The answer as a message of the conversation."""
        text = "".join(item["content"][0]["text"] for item in self.output if item["type"] == "message")
        calls = [
            {"id": item["call_id"], "type": "function",
             "function": {"name": item["name"], "arguments": arguments_object(item["arguments"])}}
            for item in self.output if item["type"] == "function_call"
        ]  # fmt: skip
        if not calls:
            return {"role": "assistant", "content": text}
        return {"role": "assistant", "content": text or None, "tool_calls": calls}

    # -- events -------------------------------------------------------------------------------------------

    def begin(self) -> Iterator[Json]:
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self.response("in_progress"))

    def take_logprobs(self, newest: GrowingList) -> None:
        """Of the tokens whose events come next, if they have any: a part of a character has none. They are those of the
        next text of a message; those of reasoning and of calls alone belong to no message."""
        if self._pending_told:
            self._pending, self._pending_told = GrowingList(), False
        self._pending.join(newest)

    def take(self, event: Event) -> Iterator[Json]:
        """What an event of the turn becomes."""
        self._pending_told = True
        match event:
            case Reasoning(text):
                yield from self._add_text("reasoning", text)
            case Content(text):
                yield from self._add_text("message", text)
            case ToolStart(_, call_id, name):
                yield from self._close()
                item = {"type": "function_call", "id": _id("fc"), "call_id": call_id, "name": name, "arguments": ""}
                yield from self._begin_item({**item, "status": "in_progress"})
            case ToolArguments(_, text):
                assert self._open is not None
                self._open["arguments"] += text
                yield self._item_event("response.function_call_arguments.delta", delta=text)

    def end(self, finish_reason: str | None, output: RequestOutput | None, num_output: int) -> Iterator[Json]:
        """Closes what is open, and the response."""
        status = "incomplete" if finish_reason == "length" else "completed"
        if not self._pending_told:  # tokens of the end, which have no text
            self._logprobs.join(self._pending)
        yield from self._close(status)
        self.final = self.response(status, usage=None if output is None else usage(output, num_output))
        yield self._event(f"response.{status}", response=self.final)

    def fail(self, message: str, code: str) -> Json:
        """The last event of a response that broke."""
        failed = self.response("failed", error={"code": code, "message": message})
        return self._event("response.failed", response=failed)

    def _add_text(self, kind: str, text: str) -> Iterator[Json]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            if kind == "message":
                self._logprobs = GrowingList()
                item = {"type": kind, "id": _id("msg"), "role": "assistant", "content": [], "status": "in_progress"}
            else:
                item = {"type": kind, "id": _id("rs"), "summary": [], "content": [], "status": "in_progress"}
            yield from self._begin_item(item)
            yield self._item_event("response.content_part.added", content_index=0, part=self._part())
        self._text += text
        if kind == "message":
            self._logprobs.join(self._pending)
            self._pending = GrowingList()
        more: Json = {"logprobs": []} if kind == "message" else {}
        yield self._item_event(f"response.{self._text_kind()}.delta", content_index=0, delta=text, **more)

    def _begin_item(self, item: Json) -> Iterator[Json]:
        self._open, self._text = item, ""
        self.output.append(item)
        yield self._event("response.output_item.added", output_index=len(self.output) - 1, item=dict(item))

    def _close(self, status: str = "completed") -> Iterator[Json]:
        item = self._open
        if item is None:
            return
        if item["type"] == "function_call":
            yield self._item_event(
                "response.function_call_arguments.done", arguments=item["arguments"], name=item["name"]
            )
        else:
            item["content"] = [self._part()]
            more: Json = {"logprobs": self._logprobs.so_far()} if item["type"] == "message" else {}
            yield self._item_event(f"response.{self._text_kind()}.done", content_index=0, text=self._text, **more)
            yield self._item_event("response.content_part.done", content_index=0, part=self._part())
        item["status"] = status
        yield self._event("response.output_item.done", output_index=len(self.output) - 1, item=dict(item))
        self._open = None

    def _part(self) -> Json:
        assert self._open is not None
        if self._open["type"] == "reasoning":
            return {"type": "reasoning_text", "text": self._text}
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": self._logprobs.so_far()}

    def _text_kind(self) -> str:
        assert self._open is not None
        return "output_text" if self._open["type"] == "message" else "reasoning_text"

    def _item_event(self, kind: str, **fields: Any) -> Json:
        assert self._open is not None
        return self._event(kind, item_id=self._open["id"], output_index=len(self.output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> Json:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}


def usage(output: RequestOutput, num_output: int) -> Json:
    """Token counts in the Responses API's words."""
    prompt = len(output.prompt_token_ids)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": output.cached_tokens},
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + num_output,
    }


def _text_options(body: ResponsesBody) -> Json:
    return {"format": {"type": "text"}} if body.text is None else body.text.model_dump(by_alias=True, exclude_none=True)


def _choice(body: ResponsesBody) -> Any:
    if body.tool_choice is None or isinstance(body.tool_choice, str):
        return body.tool_choice or "auto"
    return body.tool_choice.model_dump()


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
