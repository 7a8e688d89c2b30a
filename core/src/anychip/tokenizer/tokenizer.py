"""A checkpoint's tokenizer and chat template, from tokenizer.json and tokenizer_config.json, or a GGUF file's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from anychip.errors import CheckpointError, InvalidRequest
from anychip.gguf.model import is_gguf
from anychip.hub import resolve_folder
from anychip.tokenizer.chat_template import ChatTemplate
from anychip.tokenizer.gguf_vocabulary import read_vocabulary
from anychip.tokenizer.sentencepiece import convert
from anychip.tokenizer.special_tokens import SpecialTokens, read_object
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
        if is_gguf(folder):
            held = read_vocabulary(folder)
            _check_last(held.raw, vocab_size, folder)
            return cls._with_template(held.raw, held.names, chat_template, (held.template, held.tool_template))
        settings = read_object(folder / "tokenizer_config.json")
        raw = tokenizers.Tokenizer.from_str(_content(folder))
        # What a trainer left there would cut prompts, or fill them up.
        raw.no_truncation()
        raw.no_padding()
        special = SpecialTokens.read(folder, settings)
        special.add_to(raw, vocab_size)
        _check_last(raw, vocab_size, folder)
        return cls._with_template(raw, special.texts(), chat_template, _chat_templates(folder, settings))

    @classmethod
    def _with_template(
        cls,
        raw: tokenizers.Tokenizer,
        names: Mapping[str, str],
        file: str | None,
        own: tuple[str | None, str | None],
    ) -> Tokenizer:
        """`file` as `load` has it, `own` are the checkpoint's templates: one, and one for tools."""
        if file is not None:
            return cls(raw, ChatTemplate.read(file, names))
        source, with_tools = own
        return cls(raw, None if source is None else ChatTemplate(source, names, with_tools=with_tools))

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


def _check_last(raw: tokenizers.Tokenizer, vocab_size: int | None, folder: Path) -> None:
    last = max(raw.get_vocab(with_added_tokens=True).values(), default=-1)
    if vocab_size is not None and last >= vocab_size:
        raise CheckpointError(
            f"the tokenizer of {folder} makes ids up to {last}, the model's vocabulary has {vocab_size}: "
            "they do not belong together; give the model's own with --tokenizer"
        )


def _content(folder: Path) -> str:
    """A tokenizer.json, the checkpoint's or one converted from its SentencePiece model."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return path.read_text()
    if (folder / "tokenizer.model").is_file():
        return convert(folder)
    raise CheckpointError(f"{path} is missing; use --skip-tokenizer to serve token ids only")


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The template, and the one for conversations with tools where the checkpoint has a second."""
    named = settings.get("chat_template")
    if isinstance(named, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in named}
    elif not isinstance(named, dict):
        named = {} if named is None else {"default": named}
    if (file := folder / "chat_template.jinja").is_file():
        named = {"default": file.read_text()}
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named[file.stem] = file.read_text()
    return named.get("default"), named.get("tool_use")
