"""Request bodies: read, checked, and refused by the name of what is wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Annotated, Any, Self, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, core_schema, from_json

from anychip.errors import InvalidRequest

log = logging.getLogger("anychip.http")
Body = TypeVar("Body", bound="Strict")
T = TypeVar("T")

Several = Annotated[list[T], Field(fail_fast=True)]
"""Any number: a list of a million wrong values has one problem, not a million."""

LONG_BODY = 64 * 1024
"""Bytes above which a body is read beside the event loop."""

_MAX_VALUES = 65_536
"""Texts, lists and objects in a long body: they cost far more than their bytes. Numbers do not count."""

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

_LEFT_OUT: dict[str, Any] = {"best_of": 1, "modalities": ["text"], "verbosity": "medium"}
"""Of those, the values that mean what leaving them out means. null always does."""

_MAX_SHOWN = 200
"""Characters of a name in a message."""


class Parameters(BaseModel):
    """null means not given, for whatever may be left out."""

    model_config = ConfigDict(protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        model: Any = handler.resolve_ref_schema(schema)
        while model["type"] != "model-fields":
            model = model["schema"]
        for field in model["fields"].values():
            given = field["schema"]
            if given["type"] == "default" and given.get("default") is not None:
                given["schema"] = _null_is(given["default"], given["schema"])
        return schema


def _null_is(default: Any, schema: CoreSchema) -> CoreSchema:
    return core_schema.no_info_after_validator_function(
        lambda value: default if value is None else value, core_schema.nullable_schema(schema)
    )


class Strict(Parameters):
    """Unknown parameters are refused by name, unless they are null."""

    model_config = ConfigDict(extra="forbid")

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
    if len(raw) > LONG_BODY:
        _check_values(raw)
    try:
        return kind.read(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    ignored = [problem["loc"] for problem in unknown if _says_nothing(problem)]
    if lenient and len(ignored) < len(unknown) == len(problems):
        ignored = [problem["loc"] for problem in unknown]
        names = ", ".join(".".join(map(str, where)) for where in ignored)
        log.warning("ignored: %s", ascii(names[:_MAX_SHOWN])[1:-1])
    if not ignored:
        raise _refusal(problems)
    content = from_json(raw)
    for where in ignored:
        _delete(content, where)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)) from None


def _check_values(raw: bytes) -> None:
    """Raises InvalidRequest for a body of too many values, before any of them is made."""
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    found = bare.count(b'"') // 2
    if found <= _MAX_VALUES:
        found += sum(part.count(b"[") + part.count(b"{") for part in bare.split(b'"')[::2])  # what is in no text
    if found > _MAX_VALUES:
        raise InvalidRequest(
            f"the body holds {found} texts, lists and objects, at most {_MAX_VALUES} may be; send it in parts"
        )


def _says_nothing(problem: ErrorDetails) -> bool:
    """Whether an unknown parameter's value is the same as leaving it out."""
    value, left_out = problem["input"], _LEFT_OUT.get(str(problem["loc"][-1]))
    return value is None or (value == left_out and type(value) is type(left_out))


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


def _delete(content: Any, where: tuple[int | str, ...]) -> None:
    """Removes what a location names; parts of it that only tell members of a union apart lead nowhere."""
    for step in where[:-1]:
        if isinstance(content, list) and isinstance(step, int):
            content = content[step]
        elif isinstance(content, dict):
            content = content.get(str(step), content)
    if isinstance(content, dict):
        content.pop(where[-1], None)


def _refusal(problems: Sequence[ErrorDetails]) -> InvalidRequest:
    """The first problem, in one sentence, and the parameter it lies in."""
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    where = first["loc"]
    param = str(where[0])[:_MAX_SHOWN] if where else None
    if first["type"] == "extra_forbidden":
        name = ".".join(map(str, where))[:_MAX_SHOWN]
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
