"""Special and added tokens, from every file that may name them: tokenizer_config.json, special_tokens_map.json and
added_tokens.json. The order and the rules are those of transformers' AutoTokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from anychip.errors import CheckpointError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA, _OLDER_EXTRA = "extra_special_tokens", "additional_special_tokens"
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """`named` are texts by name, bos_token and the like, as templates write them out; `listed` are tokens that are
    added with their ids' order, `extra` special tokens without a name."""

    named: Mapping[str, tokenizers.AddedToken]
    listed: tuple[tokenizers.AddedToken, ...]
    extra: tuple[tokenizers.AddedToken, ...]

    @classmethod
    def read(cls, folder: Path, settings: Mapping[str, Any]) -> SpecialTokens:
        """`settings` are tokenizer_config.json's. Raises CheckpointError for a file that is no JSON object."""
        values = dict(settings)
        if not values.get(_EXTRA):
            values[_EXTRA] = values.pop(_OLDER_EXTRA, None)
        listed: dict[int, tokenizers.AddedToken] = {}
        if "added_tokens_decoder" in settings:
            # A folder that lists its tokens with their ids has no need of the older files.
            listed = {int(number): _token(entry) for number, entry in settings["added_tokens_decoder"].items()}
        else:
            _merge(values, read_object(folder / "special_tokens_map.json"))
            special = {token.content for token in (*_named(values).values(), *_tokens(values.get(_EXTRA)))}
            for content, number in read_object(folder / "added_tokens.json").items():
                listed[int(number)] = _added(content, special=content in special)
        named = _named(values)
        if isinstance(values.get(_EXTRA), Mapping) or not values.get(_EXTRA):
            values[_EXTRA] = values.get(_OLDER_EXTRA)
        extra = _tokens(values[_EXTRA])
        return cls(named, tuple(listed[number] for number in sorted(listed)), extra)

    def texts(self) -> dict[str, str]:
        return {name: token.content for name, token in self.named.items()}

    def add_to(self, raw: tokenizers.Tokenizer, vocab_size: int | None) -> None:
        """Adds those that the tokenizer has not. Named and extra tokens that would lie beyond the model's vocabulary
        are left out: the model cannot read them."""
        known = {token.content: repr(token) for token in raw.get_added_tokens_decoder().values()}
        names = {token.content for token in self.named.values()}
        missing: list[tokenizers.AddedToken] = []
        for token in self.listed:
            if known.get(token.content) != repr(token):
                token.special = token.special or token.content in names
                missing.append(token)
        known |= {token.content: "" for token in missing}
        raw.add_tokens(missing)
        for token in (*self.named.values(), *self.extra):
            fits = vocab_size is None or raw.get_vocab_size(with_added_tokens=True) < vocab_size
            if token.content not in known and (fits or raw.token_to_id(token.content) is not None):
                known[token.content] = ""
                raw.add_tokens([token])


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none. Raises CheckpointError for one that holds no object."""
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _merge(values: dict[str, Any], older: dict[str, Any]) -> None:
    """What special_tokens_map.json says takes the place of the settings, but for lists of extra tokens."""
    if isinstance(older.get(_EXTRA), list):
        older[_EXTRA] = [*_tokens(values.get(_EXTRA)), *_tokens(older[_EXTRA])]
    values |= older


def _named(values: Mapping[str, Any]) -> dict[str, tokenizers.AddedToken]:
    own = {key: value for key, value in values.items() if key.endswith("_token") and isinstance(value, str)}
    given = {name: values.get(name) for name in _NAMED} | {key: own[key] for key in own if key not in _NAMED}
    if isinstance(values.get(_EXTRA), Mapping):
        given |= values[_EXTRA]
    return {name: _token(value, special=True) for name, value in given.items() if value}


def _tokens(values: Any) -> tuple[tokenizers.AddedToken, ...]:
    return tuple(_token(value, special=True) for value in values) if isinstance(values, list | tuple) else ()


def _token(value: Any, *, special: bool | None = None) -> tokenizers.AddedToken:
    """A token written as its text, or as an object with flags."""
    if isinstance(value, tokenizers.AddedToken):
        return value
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True)
    flags = {name: bool(value[name]) for name in _FLAGS if name in value}
    return tokenizers.AddedToken(
        value["content"], special=bool(value.get("special", False)) if special is None else special, **flags
    )


def _added(content: str, *, special: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(content, normalized=not special, special=special)
