"""A checkpoint's chat template: Jinja in a sandbox, the operator's or the checkpoint's, never a client's. Templates see
what transformers shows them, and render as they do there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from anychip.errors import ConfigError, InvalidRequest
from anychip.tokenizer.roles import merged_at_the_beginning, with_known_roles

_TOOLS_PREAMBLE = (
    "You may call these functions. To call any, answer with nothing but a JSON list of objects "
    '{"name": ..., "parameters": {...}}.\n'
)
_REASONING = ("reasoning_content", "thinking", "reasoning")
_REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
)
"""What templates raise when they are given what they cannot write."""
_DEVELOPER = re.compile(r"""["']developer["']""")

Message = Mapping[str, Any]


class ChatTemplate:
    """`special_tokens` are bos_token and the like, which templates write out. `with_tools` is used instead of `source`
    where a conversation has tools. A template that is no Jinja is refused when it is used: completions need none."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, with_tools: str | None = None) -> None:
        self.source = source if with_tools is None else f"{source}\n{with_tools}"
        """All that the template says."""
        self._sources = (source, source if with_tools is None else with_tools)
        self._special_tokens = special_tokens
        self._environment = environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._templates: dict[str, Template] = {}

    @classmethod
    def read(cls, file: str, special_tokens: Mapping[str, str]) -> ChatTemplate:
        """An operator's template. Raises ConfigError for a file that cannot be read, or is no Jinja."""
        try:
            template = cls(Path(file).read_text(), special_tokens)
            template._compiled(template.source)
        except (OSError, UnicodeDecodeError, TemplateError) as error:
            raise ConfigError(f"--chat-template {file} cannot be used: {error}") from error
        return template

    @property
    def knows_tools(self) -> bool:
        """Whether the template writes tools; where it does not, a system message lists them."""
        return "tools" in self.source

    @property
    def knows_developer(self) -> bool:
        """Whether the template has the role `developer`; where it has not, developer messages are system messages."""
        return _DEVELOPER.search(self.source) is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, ending where the assistant's turn begins. Raises InvalidRequest for what the template refuses."""
        seen: dict[str, Any] = {"documents": None, **self._special_tokens, **(variables or {})}
        seen |= {"tools": list(tools) or None, "add_generation_prompt": add_generation_prompt}

        def readable(messages: Sequence[Message]) -> Sequence[Message]:
            if not self.knows_developer:
                messages = with_known_roles(messages)
            return messages if self.knows_tools or not tools else _with_tools(messages, tools)

        def written(messages: Sequence[Message]) -> str:
            template = self._compiled(self._sources[bool(tools)])
            return _with_nulls(lambda given: template.render({**seen, "messages": given}), messages)

        try:
            if not self.knows_developer and _loses_developers(messages, lambda given: written(readable(given))):
                return written(merged_at_the_beginning(readable(messages)))
            return written(readable(messages))
        except _REFUSALS as error:
            raise InvalidRequest(f"the chat template refused the messages: {error}", param="messages") from error

    def _compiled(self, source: str) -> Template:
        template = self._templates.get(source)
        if template is None:
            try:
                template = self._templates[source] = self._environment.from_string(source)
            except SyntaxError as error:  # a break outside of its loop
                raise TemplateError(f"it cannot be compiled: {error}") from error
        return template


def _loses_developers(messages: Sequence[Message], written: Callable[[Sequence[Message]], str]) -> bool:
    """Whether the template refuses a system message within the conversation, or leaves out what the developer says.
    Marks stand for it: its own text may be elsewhere in the prompt too."""
    marks = {at: f"\ue000{at}\ue000" for at, message in enumerate(messages) if message.get("role") == "developer"}
    if not marks:
        return False
    try:
        text = written(
            [{**message, "content": marks.get(at, message.get("content"))} for at, message in enumerate(messages)]
        )
    except TemplateError:
        return True
    return any(mark not in text for mark in marks.values())


class _Generation(Extension):
    """{% generation %}: marks what the assistant wrote, for training. The text is as if it was not there."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _with_nulls(rendered: Callable[[Sequence[Message]], str], messages: Sequence[Message]) -> str:
    """What is null is left out, as transformers does. Some templates ask for content that is none, or join it to other
    text: where one refuses a message without content, it gets null, and then an empty text."""
    try:
        return rendered([_for_template(message) for message in messages])
    except (TemplateError, TypeError):
        if all(message.get("content") is not None for message in messages):
            raise
    try:
        return rendered([_for_template(message, content=None) for message in messages])
    except (TemplateError, TypeError):
        return rendered([_for_template(message, content="") for message in messages])


def _for_template(message: Message, **absent: Any) -> dict[str, Any]:
    """Without what is null, but for `absent`; reasoning also under the names that other templates read it by."""
    given = {key: value for key, value in message.items() if value is not None}
    given |= {key: value for key, value in absent.items() if key not in given}
    reasoning = next((given[key] for key in _REASONING if key in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _with_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Sequence[Message]:
    listed = _TOOLS_PREAMBLE + "\n".join(_to_json(tool["function"]) for tool in tools)
    first = messages[0] if messages else None
    if first is not None and first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{listed}"}, *messages[1:]]
    return [{"role": "system", "content": listed}, *messages]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As templates expect it: Jinja's own filter would escape what is HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)
