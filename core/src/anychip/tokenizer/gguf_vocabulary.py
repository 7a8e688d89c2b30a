"""The tokenizer of a GGUF file: its metadata as a `tokenizers` object, the texts of its special tokens, its template.

Two kinds of vocabulary are read. `gpt2` is byte-level byte-pair encoding with merges. `llama` is SentencePiece's
byte-pair encoding, with a score for each piece and none for merges: of two neighbours those join first whose joint
piece has the best score, so the merges are all ways to make a piece from two others, by its score.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from anychip.errors import CheckpointError
from anychip.gguf.eog import CONTROL
from anychip.gguf.metadata import Metadata
from anychip.gguf.model import read_model
from anychip.tokenizer.pre_tokenizers import WORDS, Words

_NORMAL, _UNKNOWN, _USER = 1, 2, 4
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
"""What templates call a token, and the metadata's word, misspelt as it is there."""
_SPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`names` are texts of special tokens by name, bos_token and the like."""

    raw: tokenizers.Tokenizer
    names: Mapping[str, str]
    template: str | None
    tool_template: str | None


def read_vocabulary(path: Path) -> Vocabulary:
    """Raises CheckpointError for a file without a tokenizer, with one of an unknown kind, or with a broken one."""
    metadata = read_model(path).metadata
    tokens = metadata.texts("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(
            f"{path} has no tokenizer in its metadata; give one with --tokenizer, or use --skip-tokenizer"
        )
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = metadata.text("tokenizer.ggml.model")
    if kind not in makers:
        raise CheckpointError(
            f"{path} has a tokenizer of the kind {kind!r}; {' and '.join(makers)} are read: give the model's own with "
            "--tokenizer"
        )
    kinds = metadata.numbers("tokenizer.ggml.token_type")
    if kinds is not None and len(kinds) != len(tokens):
        raise CheckpointError(f"{path} has {len(tokens)} tokens and {len(kinds)} types of tokens")
    try:
        raw = makers[kind](metadata, tokens, kinds)
    except CheckpointError:
        raise
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise CheckpointError(f"the tokenizer of {path} cannot be built: {error}") from error
    raw.add_tokens(list(_added(tokens, kinds)))
    return Vocabulary(
        raw,
        {f"{name}_token": text for name in _NAMED if (text := _special(metadata, tokens, name)) is not None},
        metadata.text("tokenizer.chat_template"),
        metadata.text("tokenizer.chat_template.tool_use"),
    )


def _byte_level(metadata: Metadata, tokens: Sequence[str], kinds: Sequence[int] | None) -> tokenizers.Tokenizer:
    merges = metadata.texts("tokenizer.ggml.merges")
    if merges is None:
        raise CheckpointError(f"{metadata.path} has no 'tokenizer.ggml.merges', which its kind of tokenizer needs")
    pre = metadata.text("tokenizer.ggml.pre") or "default"
    words = WORDS.get(pre)
    if words is None:
        raise CheckpointError(
            f"{metadata.path} cuts texts as {pre!r} (tokenizer.ggml.pre), which is not known; known are "
            f"{', '.join(WORDS)}: give the model's own tokenizer with --tokenizer"
        )
    pairs = [_pair(merge, metadata.path) for merge in merges]
    raw = tokenizers.Tokenizer(models.BPE(_ids(tokens), pairs, ignore_merges=words.whole_words))
    raw.pre_tokenizer = words.pre_tokenizer()
    raw.decoder = decoders.ByteLevel()
    _frame(raw, metadata, tokens, words)
    return raw


def _pair(merge: str, path: Path) -> tuple[str, str]:
    first, _, second = merge.partition(" ")
    if not first or not second:
        raise CheckpointError(f"{path}: merge {merge!r} is not two pieces with a space between them")
    return first, second


def _sentencepiece(metadata: Metadata, tokens: Sequence[str], kinds: Sequence[int] | None) -> tokenizers.Tokenizer:
    scores = metadata.numbers("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        held = "no" if scores is None else len(scores)
        raise CheckpointError(f"{metadata.path} has {len(tokens)} tokens and {held} scores of tokens")
    vocabulary = _ids(tokens)
    unknown = _special(metadata, tokens, "unk")
    raw = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            list(_merges(tokens, scores, kinds, vocabulary)),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback="<0x00>" in vocabulary,
        )
    )
    prefixed = metadata.flag("tokenizer.ggml.add_space_prefix") is not False
    spaces = normalizers.Replace(" ", _SPACE)
    raw.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    _frame(raw, metadata, tokens, Words((), add_bos=True))
    return raw


def _merges(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int] | None, vocabulary: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    """Best pieces first. Pieces of the user's own come before all: SentencePiece finds them before it joins any."""
    ranked: list[tuple[bool, float, int]] = []
    for id, score in enumerate(scores):
        kind = _NORMAL if kinds is None else kinds[id]
        if kind in (_NORMAL, _USER):
            ranked.append((kind != _USER, -score, id))
    for _, _, id in sorted(ranked):
        piece = tokens[id]
        ways = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [(vocabulary[a], vocabulary[b]) for a, b in ways if a in vocabulary and b in vocabulary]
        for first, second in sorted(known):
            yield tokens[first], tokens[second]


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    """Of a token that is listed twice, the first id."""
    found: dict[str, int] = {}
    for id, token in enumerate(tokens):
        found.setdefault(token, id)
    return found


def _added(tokens: Sequence[str], kinds: Sequence[int] | None) -> Iterator[AddedToken]:
    for token, kind in zip(tokens, kinds or (), strict=False):
        if token and kind in (CONTROL, _UNKNOWN, _USER):
            yield AddedToken(token, special=kind != _USER, normalized=False)


def _special(metadata: Metadata, tokens: Sequence[str], name: str) -> str | None:
    id = metadata.integer(f"tokenizer.ggml.{_NAMED[name]}_token_id")
    if id is not None and not 0 <= id < len(tokens):
        raise CheckpointError(f"{metadata.path}: {_NAMED[name]}_token_id is {id}, and there are {len(tokens)} tokens")
    return None if id is None else tokens[id]


def _frame(raw: tokenizers.Tokenizer, metadata: Metadata, tokens: Sequence[str], words: Words) -> None:
    """What stands before and after every text."""
    asked = {
        "bos": metadata.flag("tokenizer.ggml.add_bos_token"),
        "eos": metadata.flag("tokenizer.ggml.add_eos_token"),
    }
    if asked["bos"] is None:
        asked["bos"] = words.add_bos
    used = {name: text for name in asked if asked[name] and (text := _special(metadata, tokens, name)) is not None}
    if used:
        before, after = ([used[name]] if name in used else [] for name in ("bos", "eos"))
        ids = [(text, metadata.integer(f"tokenizer.ggml.{name}_token_id")) for name, text in used.items()]
        raw.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], pair=[*before, "$A", *after, "$B", *after], special_tokens=ids
        )
