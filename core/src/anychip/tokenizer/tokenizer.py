"""A checkpoint's tokenizer and chat template, from tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from anychip.errors import CheckpointError, InvalidRequest
from anychip.hub import resolve_folder
from anychip.tokenizer.chat_template import ChatTemplate
from anychip.tokenizer.sentencepiece import convert
from anychip.tokenizer.token_bytes import TokenBytes

_MAX_ID = 2**32 - 1
"""The largest that `tokenizers` takes."""


class Tokenizer:
    """`raw` is the `tokenizers` object. `chat_template` None: the model has none. `known_bytes` None: its decoder
    cannot be read token by token. `all_bytes` is token_bytes as a table, `shown_bytes` without special tokens'."""

    def __init__(self, raw: tokenizers.Tokenizer, chat_template: ChatTemplate | None) -> None:
        self.raw = raw
        self.chat_template = chat_template
        self.known_bytes = TokenBytes.of(raw.decoder)
        added = raw.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        self.special_ids = frozenset(id for id in map(raw.token_to_id, special) if id is not None)
        self.all_bytes = _Bytes(self._read_bytes)
        self.shown_bytes = _Bytes(lambda id: b"" if id in self.special_ids else self.all_bytes[id])

    @classmethod
    def load(cls, model: str, vocab_size: int | None = None, *, chat_template: str | None = None) -> Tokenizer:
        """`chat_template` is a file that replaces the checkpoint's. Raises CheckpointError where the checkpoint has no
        tokenizer, or one that makes ids beyond `vocab_size`."""
        folder = resolve_folder(model)
        settings_path = folder / "tokenizer_config.json"
        settings = msgspec.json.decode(settings_path.read_bytes()) if settings_path.is_file() else {}
        raw = tokenizers.Tokenizer.from_str(_content(folder))
        _add_tokens(raw, settings)
        last = max(raw.get_vocab(with_added_tokens=True).values(), default=-1)
        if vocab_size is not None and last >= vocab_size:
            raise CheckpointError(
                f"the tokenizer of {folder} makes ids up to {last}, the model's vocabulary has {vocab_size}: "
                "they do not belong together; give the model's own with --tokenizer"
            )
        names = {key: _special(settings.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
        if chat_template is not None:
            return cls(raw, ChatTemplate.read(chat_template, names))
        source = _chat_template(folder, settings)
        return cls(raw, None if source is None else ChatTemplate(source, names))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        # `encode` would keep every other thread from running until it is done.
        (encoding,) = self.raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.raw.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def name(self, token_id: int) -> str | None:
        """A token's name in the vocabulary; None for an id that has none."""
        if not 0 <= token_id <= _MAX_ID:
            return None
        name: str | None = self.raw.id_to_token(token_id)
        return name

    def is_shown(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether a token is part of the text."""
        return self.name(token_id) is not None and not (skip_special_tokens and token_id in self.special_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text that has begun: its exact bytes, with its leading space, and parts of a
        character where it is no whole one. Special tokens are their own text; ids without a token have no bytes."""
        return self.all_bytes[token_id]

    def token(self, token_id: int) -> str:
        """One token as text; bytes that are no text of their own show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _read_bytes(self, token_id: int) -> bytes:
        name = self.name(token_id)
        if name is None:
            return b""
        if self.known_bytes is None:
            return self.decode([token_id], skip_special_tokens=False).encode()
        return self.known_bytes.after_others(name)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt for a conversation; options are ChatTemplate.render's. Raises InvalidRequest."""
        if self.chat_template is None:
            raise InvalidRequest("the model has no chat template; use completions", param="messages")
        return self.chat_template.render(messages, **options)


class _Bytes(dict[int, bytes]):
    """Bytes by token: reading them takes some microseconds, and likely tokens are asked for again and again."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        super().__init__()
        self._read = read

    def __missing__(self, token_id: int) -> bytes:
        data = self[token_id] = self._read(token_id)
        return data


def _content(folder: Path) -> str:
    """A tokenizer.json, the checkpoint's or one converted from its SentencePiece model."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return path.read_text()
    if (folder / "tokenizer.model").is_file():
        return convert(folder)
    raise CheckpointError(f"{path} is missing; use --skip-tokenizer to serve token ids only")


def _add_tokens(raw: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Tokens that were added after tokenizer.json was written: tokenizer_config.json says which, and their ids."""
    listed = sorted((int(number), entry) for number, entry in settings.get("added_tokens_decoder", {}).items())
    for number, entry in listed:
        content = entry["content"]
        if raw.token_to_id(content) is None and number == raw.get_vocab_size(with_added_tokens=True):
            flags = {name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized")}
            token = tokenizers.AddedToken(content, special=bool(entry.get("special", False)), **flags)
            raw.add_tokens([token])


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
