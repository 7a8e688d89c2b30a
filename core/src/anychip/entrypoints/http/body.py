"""Request bodies: read, checked, and refused by the name of what is wrong."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Self, TypeVar

import msgspec
from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError

from anychip.errors import InvalidRequest

log = logging.getLogger("anychip.http")
Body = TypeVar("Body", bound="Strict")

LONG_BODY = 64 * 1024
"""Bytes above which a body is read beside the event loop."""

REMOVED = {
    "best_of": "generate n answers and choose among them",
    "suffix": "the served models do not fill in",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "guided_json": "use structured_outputs.json or response_format",
    "guided_regex": "use structured_outputs.regex",
    "guided_choice": "use structured_outputs.choice",
    "guided_grammar": "use structured_outputs.grammar",
    "chat_template": "the operator chooses it with --chat-template",
    "modalities": "answers are text",
    "audio": "answers are text",
    "prediction": "predicted outputs are not supported",
    "web_search_options": "the server searches nothing",
    "verbosity": "say it in a message",
    "logits_processors": "code is not taken from clients",
}
"""Parameters of other servers, or of earlier times, and what to do instead."""


class Strict(BaseModel):
    """Unknown parameters are refused by name."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @classmethod
    def read(cls, raw: bytes) -> Self:
        """A body of JSON. Raises ValidationError."""
        return cls.model_validate_json(raw)


async def read_body(request: Request, kind: type[Body], *, lenient: bool) -> Body:
    """`lenient` ignores unknown parameters, with a warning in the log. Raises InvalidRequest."""
    raw = await request.body()
    if len(raw) > LONG_BODY:
        return await asyncio.to_thread(checked, raw, kind, lenient=lenient)
    return checked(raw, kind, lenient=lenient)


def checked(raw: bytes, kind: type[Body], *, lenient: bool = False) -> Body:
    """The same of a body that is at hand."""
    try:
        return kind.read(raw)
    except ValidationError as error:
        if lenient and (accepted := _without_unknown(raw, kind, error)) is not None:
            return accepted
        raise _refusal(error) from None


def schema_of(kind: type[BaseModel]) -> dict[str, Any]:
    """The body's part of the OpenAPI document."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def schema_parts(*kinds: type[BaseModel]) -> dict[str, Any]:
    """What the bodies' schemas refer to."""
    parts: dict[str, Any] = {}
    for kind in kinds:
        parts |= kind.model_json_schema(ref_template="#/components/schemas/{model}").get("$defs", {})
    return parts


def _without_unknown(raw: bytes, kind: type[Body], error: ValidationError) -> Body | None:
    unknown = [problem["loc"] for problem in error.errors(include_url=False, include_input=False)]
    if any(problem["type"] != "extra_forbidden" for problem in error.errors(include_url=False, include_input=False)):
        return None
    content = msgspec.json.decode(raw)
    for where in unknown:
        _delete(content, where)
    log.warning("ignored: %s", ", ".join(".".join(map(str, where)) for where in unknown))
    try:
        return kind.model_validate(content)
    except ValidationError:
        return None


def _delete(content: Any, where: tuple[int | str, ...]) -> None:
    """Removes what a location names; parts of it that only tell members of a union apart lead nowhere."""
    for step in where[:-1]:
        if isinstance(content, list) and isinstance(step, int):
            content = content[step]
        elif isinstance(content, dict):
            content = content.get(str(step), content)
    if isinstance(content, dict):
        content.pop(where[-1], None)


def _refusal(error: ValidationError) -> InvalidRequest:
    """The first problem, in one sentence, and the parameter it lies in."""
    problems = error.errors(include_url=False)
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    where = first["loc"]
    param = str(where[0]) if where else None
    if first["type"] == "extra_forbidden":
        name = ".".join(map(str, where))
        remedy = REMOVED.get(str(where[-1]))
        return InvalidRequest(
            f"unknown parameter {name!r}" if remedy is None else f"parameter {name!r} is not supported: {remedy}",
            param=name,
        )
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if not where:
        return InvalidRequest("the body is not a JSON object")
    path = ".".join(str(step) for step in where if not isinstance(step, str) or step.isidentifier())
    return InvalidRequest(f"{path or param}: {first['msg']}", param=param)
