"""A checkpoint's tokenizer and chat template, from tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from anychip.errors import CheckpointError, InvalidRequest
from anychip.model_config import resolve_folder


class Tokenizer:
    """`raw` is the `tokenizers` object, for incremental decoding."""

    def __init__(self, raw: tokenizers.Tokenizer, settings: Mapping[str, Any], chat_template: str | None) -> None:
        self.raw = raw
        self.settings = settings
        self._template = chat_template
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        self._environment.globals["raise_exception"] = _refuse

    @classmethod
    def load(cls, model: str) -> Tokenizer:
        """Raises CheckpointError where the checkpoint has no tokenizer.json."""
        folder = resolve_folder(model)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; use --skip-tokenizer to serve token ids only")
        settings_path = folder / "tokenizer_config.json"
        settings = msgspec.json.decode(settings_path.read_bytes()) if settings_path.is_file() else {}
        return cls(tokenizers.Tokenizer.from_file(str(path)), settings, _chat_template(folder, settings))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self.raw.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.raw.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str:
        """One token as text; bytes that are no text of their own show as U+FFFD."""
        return self.decode([token_id], skip_special_tokens=False)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt for a conversation, ending where the assistant's turn begins. Raises InvalidRequest."""
        if self._template is None:
            raise InvalidRequest("the model has no chat template; use completions", param="messages")
        names = {key: _special(self.settings.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
        try:
            text = self._environment.from_string(self._template).render(
                messages=list(messages), add_generation_prompt=True, **names
            )
        except (TemplateError, TypeError) as error:
            raise InvalidRequest(f"the chat template refused the messages: {error}", param="messages") from error
        return text


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return template


def _special(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(token or "")


def _refuse(message: str) -> None:
    raise TemplateError(message)
