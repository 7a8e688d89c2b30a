"""Turns a prompt into a request that the engine can run, or says why it cannot. Nothing is allocated here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from anychip.engine.embedded_prompt import EmbeddedPrompt
from anychip.engine.token_ids import packed
from anychip.errors import ContextTooLong, InvalidRequest
from anychip.kv_cache.hashing import prompt_hashes
from anychip.messages import AddRequest
from anychip.prefix import MediaSpan, PrefixRoot, check_prefix
from anychip.prompt_extras import PromptExtras
from anychip.sampling_params import SamplingParams
from anychip.tasks.detect import refusal
from anychip.tasks.served import ServedTask
from anychip.tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[int] | EmbeddedPrompt


class RequestOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a request is, beside its prompt and its sampling."""

    priority: int = 0
    cache_salt: str = ""
    """Prompts share cached prefixes only under the same salt."""
    tenant: str = ""
    """Whose it is, for policies that share the device fairly."""
    deadline: float | None = None
    """Seconds after which it ends with an error."""
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    """Keeps that many of the prompt's last tokens; -1: as many as fit."""
    trace_headers: Mapping[str, str] = {}
    """The caller's, for distributed traces."""
    structured_after: str = ""
    """The text after which structured output begins, such as the end of reasoning; "": at once."""
    adapter: bytes | None = None
    """Digest of the adapter that the request runs with; None: without any."""
    media: tuple[MediaSpan, ...] = ()
    """The prompt's tokens that stand for media, in order; such a prompt is token ids."""
    whole: bool = False
    """Its outputs are not read as they come: where nothing needs them earlier, a sequence's are one, at its end."""
    extras: PromptExtras | None = None
    """Whose spans of embeddings are media spans too, with digests: an EmbeddedPrompt brings both."""


class InputProcessor:
    """`tokenizer` None: prompts are token ids only, and nothing is detokenized. `hash_block_size`: tokens under one
    hash of the engine's prefix cache; None: it has none. `weights_version` is the engine's, kept up to date by who owns
    both: under an older one the engine hashes prompts again. `served` is the model's task; None: it draws text."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: Sequence[int],
        hash_block_size: int | None = None,
        served: ServedTask | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = tuple(eos_token_ids)
        self.hash_block_size = hash_block_size
        self.weights_version = 0
        self._vectors_only = None if served is None or served.draws else served

    def process(
        self, request_id: str, prompt: Prompt, sampling: SamplingParams, options: RequestOptions | None = None
    ) -> AddRequest:
        """Raises InvalidRequest for an empty prompt or an id outside the vocabulary, ContextTooLong when prompt and
        max_tokens exceed the model's length. Takes some 10 ms for a prompt of 100,000 ids, in which other threads run.
        """
        options = options or RequestOptions()
        if isinstance(prompt, EmbeddedPrompt):
            media, extras = prompt.media(), prompt.extras(options.extras)
            options = msgspec.structs.replace(options, media=media, extras=extras)
            prompt = prompt.token_ids
        ids = packed(self.tokenize(prompt, options.add_special_tokens), self.vocab_size)
        if options.truncate_prompt_tokens is not None:
            ids = ids[-4 * self._kept(options.truncate_prompt_tokens, sampling) :]
        num_prompt = len(ids) // 4
        room = self.max_model_len - num_prompt
        asked = sampling.max_tokens
        if options.extras is not None and options.extras.pooling is not None:
            room, asked = room + 1, 1  # nothing is drawn behind the prompt
        elif self._vectors_only is not None:
            raise InvalidRequest(refusal(self._vectors_only, "text"), param="model")
        if room < 1 or (asked or 1) > room:
            wants = "at least 1" if asked is None else str(asked)
            raise ContextTooLong(
                f"the prompt has {num_prompt} tokens and {wants} more are asked for; the model's context holds "
                f"{self.max_model_len}; " + (f"max_tokens may be {room} at most" if room > 0 else "shorten the prompt"),
                param="max_tokens" if room > 0 else "prompt",
            )
        if sampling.stop and self.tokenizer is None:
            raise InvalidRequest("stop strings need the tokenizer, which is off", param="stop")
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            bad = next((t for t in getattr(sampling, name) or () if t >= self.vocab_size), None)
            if bad is not None:
                raise InvalidRequest(f"{name} holds {bad}, the vocabulary has {self.vocab_size}", param=name)
        if sampling.structured is not None and sampling.ignore_eos:
            raise InvalidRequest("ignore_eos and structured output exclude each other", param="ignore_eos")
        root = self._root(options, num_prompt)
        size = self.hash_block_size
        stop_ids = sampling.stop_token_ids + (() if sampling.ignore_eos else self.eos_token_ids)
        return AddRequest(
            request_id=request_id,
            prompt=ids,
            sampling=sampling,
            max_output=room if asked is None else asked,
            stop_ids=stop_ids,
            priority=options.priority,
            cache_salt=root.salt,
            bad_token_ids=self._bad_tokens(sampling.bad_words),
            tenant=options.tenant,
            deadline=options.deadline,
            structured_after=self._marker(options.structured_after),
            block_hashes=b"" if size is None else prompt_hashes(ids, size, root, options.media),
            weights_version=root.weights_version,
            adapter=root.adapter,
            media=options.media,
            # Stop strings are looked for, and log-probabilities are reported, token by token; beams end together.
            whole=options.whole and not sampling.stop and sampling.logprobs is None and not sampling.beam_width,
            extras=options.extras,
        )

    def _root(self, options: RequestOptions, num_prompt: int) -> PrefixRoot:
        if options.media and options.truncate_prompt_tokens is not None:
            raise InvalidRequest(
                f"truncate_prompt_tokens is {options.truncate_prompt_tokens}, and the prompt has {len(options.media)} "
                "media spans, which it would move; leave it out",
                param="truncate_prompt_tokens",
            )
        check_prefix(options.adapter, options.media, num_prompt)
        return PrefixRoot(adapter=options.adapter, weights_version=self.weights_version, salt=options.cache_salt)

    def _marker(self, text: str) -> tuple[int, ...]:
        if not text or self.tokenizer is None:
            return ()
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _kept(self, asked: int, sampling: SamplingParams) -> int:
        if asked == -1:
            return max(1, self.max_model_len - (sampling.max_tokens or 1))
        if asked < 1:
            raise InvalidRequest(
                f"truncate_prompt_tokens is {asked}; expected 1 or more, or -1 for as many as fit",
                param="truncate_prompt_tokens",
            )
        return asked

    def _bad_tokens(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word at a text's beginning, and after a space."""
        if not words:
            return ()
        if self.tokenizer is None:
            raise InvalidRequest("bad_words need the tokenizer, which is off", param="bad_words")
        texts = [text for word in words for text in (word, " " + word.lstrip())]
        found = (tuple(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts)
        return tuple(dict.fromkeys(ids for ids in found if ids))

    def tokenize(self, prompt: str | Sequence[int], add_special_tokens: bool) -> Sequence[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequest("a text prompt needs the tokenizer, which is off; send token ids", param="prompt")
            # Every token covers at least one byte of text, and few tokens cover more than 64.
            if len(prompt) > 64 * self.max_model_len:
                raise ContextTooLong(
                    f"the prompt has {len(prompt)} characters, far beyond a context of {self.max_model_len} tokens",
                    param="prompt",
                )
            return self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        return prompt
