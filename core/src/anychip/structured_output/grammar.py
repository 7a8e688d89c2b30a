"""From what a request asks for to a grammar that llguidance reads, with the refusals that a user can act on."""

from __future__ import annotations

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from anychip.errors import InvalidRequest
from anychip.sampling_params import StructuredOutput
from anychip.structured_output.schemas import Schema, with_every

MAX_BYTES = 256 * 1024
"""Of a schema, expression or grammar as text."""

MAX_DEPTH = 64
"""Of a schema's nesting."""

MAX_CHOICES = 4096


_FORMATS = frozenset(
    {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "unknown", "uri", "uuid"}
)
"""Formats of strings that are enforced. JSON Schema lets others be notes for the reader."""


def to_grammar(wanted: StructuredOutput) -> str:
    """Raises InvalidRequest for what cannot be one."""
    if len(wanted.value.encode()) > MAX_BYTES:
        raise InvalidRequest(
            f"the {wanted.kind} has {len(wanted.value.encode())} bytes, at most {MAX_BYTES}", param=wanted.kind
        )
    try:
        match wanted.kind:
            case "json_object":
                return _json_grammar('{"type": "object"}')
            case "json_schema":
                _check_depth(wanted.value)
                return _json_grammar(_without_notes(wanted.value))
            case "regex":
                return str(LLMatcher.grammar_from_regex(wanted.value))
            case "choice":
                return _choice_grammar(wanted.value)
            case "grammar":
                return str(LLMatcher.grammar_from_lark(wanted.value))
    except ValueError as error:
        raise refusal(wanted, str(error)) from error


def compiled(wanted: StructuredOutput, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at its beginning. Raises InvalidRequest naming what is wrong or not supported."""
    matcher = LLMatcher(tokenizer, to_grammar(wanted), log_level=0, limits=_limits())
    if matcher.is_error():
        raise refusal(wanted, matcher.get_error())
    return matcher


def refusal(wanted: StructuredOutput, reason: str) -> InvalidRequest:
    """A library's reason as an answer to the user."""
    text = " ".join(reason.replace("<non-verbose/>", "").split())[:300]
    if text.startswith("NoExtension"):
        text = "no output satisfies it"
    return InvalidRequest(f"the {wanted.kind} cannot be followed: {text or 'no reason given'}", param=wanted.kind)


def _limits() -> LLParserLimits:
    """What a request's grammar may cost: about 20 ms to begin with, and some milliseconds a token."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def _json_grammar(schema: str) -> str:
    return str(LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": "[ ]?"}))


def _without_notes(schema: str) -> str:
    """The schema without formats that are not enforced. What is no JSON is left to the library, which says so."""
    if '"format"' not in schema:
        return schema
    try:
        return msgspec.json.encode(with_every(msgspec.json.decode(schema.encode()), _enforced)).decode()
    except msgspec.DecodeError:
        return schema


def _enforced(schema: Schema) -> Schema:
    noted = isinstance(schema.get("format"), str) and schema["format"] not in _FORMATS
    return {key: value for key, value in schema.items() if not (noted and key == "format")}


def _choice_grammar(value: str) -> str:
    choices = msgspec.json.decode(value.encode(), type=list[str])
    if not choices or len(choices) > MAX_CHOICES or not all(choices):
        raise InvalidRequest(f"choice takes 1 to {MAX_CHOICES} texts, none of them empty", param="choice")
    return str(LLMatcher.grammar_from_lark("start: " + " | ".join(msgspec.json.encode(c).decode() for c in choices)))


def _check_depth(schema: str) -> None:
    depth = deepest = 0
    for character in schema:
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise InvalidRequest(f"the schema nests {deepest} levels, at most {MAX_DEPTH}", param="json_schema")
