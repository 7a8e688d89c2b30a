"""Refuses what --speculate cannot run before any device is opened: models that do not go together, heads that nobody
reads. Does not load weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from anychip.config import EngineConfig
from anychip.errors import ConfigError
from anychip.head_config import load_head_config, load_medusa_config
from anychip.model_config import ModelConfig, load_model_config
from anychip.mtp_config import load_mtp_config
from anychip.tokenizer.tokenizer import Tokenizer

_OTHERS = "there are ngram, suffix, auto, draft:MODEL, eagle:HEAD and medusa:HEADS"

_HEADS_OF = {"eagle": "eagle:HEAD", "medusa": "medusa:HEADS"}


def check_speculation(config: EngineConfig, model: ModelConfig, own_tokenizer: Callable[[], Tokenizer]) -> None:
    """`own_tokenizer` loads the target's. Raises ConfigError, which names both sides of what does not fit, and
    CheckpointError for a draft model or a head whose files cannot be read."""
    kind, _, source = (config.speculate or "").partition(":")
    if config.taps and (config.own_head or kind in _HEADS_OF):
        raise ConfigError(f"a head reads taps of its own; give taps {config.taps} or --speculate {kind}, not both")
    if config.own_head:
        load_mtp_config(model, _OTHERS)
    if kind in _HEADS_OF:
        if not source:
            raise ConfigError(f"--speculate {kind} names no head; give {_HEADS_OF[kind]}: a folder or a repository")
        _check_head(kind, source, config, model)
    if kind == "draft":
        if not source:
            raise ConfigError("--speculate draft names no model; give draft:MODEL, with a folder or a repository")
        _check_draft(load_model_config(source), model, None if config.skip_tokenizer else own_tokenizer)


def _check_head(kind: str, source: str, config: EngineConfig, model: ModelConfig) -> None:
    if kind == "eagle":
        load_head_config(source, model)
        return
    count = load_medusa_config(source, model).num_heads
    if count < config.max_drafts:
        raise ConfigError(
            f"--speculate medusa: {source} has {count} heads, each for one token, and max_drafts is "
            f"{config.max_drafts}; give --max-drafts {count}"
        )


def _check_draft(draft: ModelConfig, target: ModelConfig, own_tokenizer: Callable[[], Tokenizer] | None) -> None:
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"--speculate: the draft model {draft.folder} has a vocabulary of {draft.vocab_size} tokens, and the "
            f"target {target.folder} has {target.vocab_size}; use a draft model of the same family"
        )
    if own_tokenizer is None or draft.folder == target.folder:
        return
    ours, theirs = (tokenizer.raw.get_vocab() for tokenizer in (own_tokenizer(), Tokenizer.load(draft.folder)))
    if ours != theirs:
        raise ConfigError(
            f"--speculate: the tokenizer of the draft model {draft.folder} is another one than that of the target "
            f"{target.folder}: {_difference(ours, theirs)}; use a draft model of the same family"
        )


def _difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """The first token that they do not share, in words."""
    mine, other = ({id: text for text, id in vocabulary.items()} for vocabulary in (ours, theirs))
    at = min(id for id in {*mine, *other} if mine.get(id) != other.get(id))
    return f"token {at} is {mine.get(at, 'none')!r} in the target's and {other.get(at, 'none')!r} in the draft model's"
