"""A checkpoint's chat template: Jinja in a sandbox, the operator's or the checkpoint's, never a client's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from anychip.errors import ConfigError, InvalidRequest

_TOOLS_PREAMBLE = (
    "You may call these functions. To call any, answer with nothing but a JSON list of objects "
    '{"name": ..., "parameters": {...}}.\n'
)


class ChatTemplate:
    """`special_tokens` are bos_token and the like, which templates write out. A template that is no Jinja is refused
    when it is used: completions need none."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = special_tokens
        self._environment = environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template: Template | None = None

    @classmethod
    def read(cls, file: str, special_tokens: Mapping[str, str]) -> ChatTemplate:
        """An operator's template. Raises ConfigError for a file that cannot be read, or is no Jinja."""
        try:
            template = cls(Path(file).read_text(), special_tokens)
            template._compiled()
        except (OSError, UnicodeDecodeError, TemplateError) as error:
            raise ConfigError(f"--chat-template {file} cannot be used: {error}") from error
        return template

    @property
    def knows_tools(self) -> bool:
        """Whether the template writes tools; where it does not, a system message lists them."""
        return "tools" in self.source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, ending where the assistant's turn begins. Raises InvalidRequest for what the template refuses."""
        if tools and not self.knows_tools:
            messages = _with_tools(messages, tools)
        try:
            return self._compiled().render(
                **(variables or {}),
                messages=list(messages),
                tools=list(tools) or None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise InvalidRequest(f"the chat template refused the messages: {error}", param="messages") from error

    def _compiled(self) -> Template:
        if self._template is None:
            self._template = self._environment.from_string(self.source)
        return self._template


def _with_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    listed = _TOOLS_PREAMBLE + "\n".join(_to_json(tool["function"]) for tool in tools)
    first = messages[0] if messages else None
    if first is not None and first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{listed}"}, *messages[1:]]
    return [{"role": "system", "content": listed}, *messages]


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """As templates expect it: Jinja's own filter would escape what is HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateError(message)
