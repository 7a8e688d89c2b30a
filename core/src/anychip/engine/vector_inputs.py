"""Turns texts, pairs of texts and ids into prompts that end with a vector, as the model's files say: prompts before
texts, special tokens, lengths, which text of a pair a token belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import tokenizers

from anychip.errors import ContextTooLong, InvalidRequest
from anychip.prompt_extras import Pooling, PoolingKind, PromptExtras
from anychip.tasks.served import ServedTask
from anychip.tokenizer.tokenizer import Tokenizer

_LETTERS_A_TOKEN = 64
"""Few tokens cover more."""


class TextPair(NamedTuple):
    """Two texts that a model reads together: a question and a document, say."""

    first: str
    second: str


Text = str | TextPair | Sequence[int]


class VectorAsk(msgspec.Struct, frozen=True, kw_only=True):
    """What a request wants of its vectors, beside their texts. None: what the model's files say."""

    truncate: bool = False
    """Whether a text that is too long is cut; it is refused otherwise."""
    max_tokens: int | None = None
    """Cuts texts to so many tokens."""
    prompt: str | None = None
    """What is put before a text."""
    prompt_name: str | None = None
    """The same, by its name in the model's files."""
    normalize: bool | None = None
    dimensions: int | None = None
    pooling: PoolingKind | None = None
    left: bool | None = None
    """Whether a text that is too long loses its beginning."""
    param: str = "input"
    """What the request calls its texts."""


class VectorPrompt(NamedTuple):
    token_ids: Sequence[int]
    extras: PromptExtras


class VectorInputs:
    """`max_length` in tokens; `segments`: the model tells the texts of a pair apart; `cuts_left`: texts that are too
    long lose their beginning. `tokenizer` None: prompts are ids."""

    def __init__(
        self,
        served: ServedTask,
        tokenizer: Tokenizer | None,
        *,
        max_length: int,
        segments: bool = False,
        cuts_left: bool = False,
    ) -> None:
        self.served = served
        self.max_length = max_length
        self._raw = None if tokenizer is None else tokenizer.raw
        self._template = None if tokenizer is None else tokenizer.chat_template
        self._segments = segments
        self._cuts_left = cuts_left

    def prompt(self, text: Text, ask: VectorAsk) -> VectorPrompt:
        """Raises InvalidRequest, and ContextTooLong where the text is too long and not to be cut."""
        limit = self.max_length if ask.max_tokens is None else self._limit(ask)
        cut = ask.truncate or ask.max_tokens is not None
        second_from: int | None = None
        if isinstance(text, TextPair) and self.served.in_template:
            ids: Sequence[int] = self._in_template(text, ask, limit, cut=cut)
        elif isinstance(text, str | TextPair):
            encoding = self._encoded(text, ask, limit, cut=cut)
            ids = encoding.ids
            if isinstance(text, TextPair) and self._segments and 1 in encoding.type_ids:
                second_from = encoding.type_ids.index(1)
        else:
            ids = text
            if cut and len(ids) > limit:
                ids = ids[-limit:] if self._left(ask) else ids[:limit]
        if not ids:
            raise InvalidRequest("the text is empty", param=ask.param)
        if len(ids) > limit:
            raise ContextTooLong(
                f"the text has {len(ids)} tokens, and the model takes {limit}; shorten it, or ask for truncation",
                param=ask.param,
            )
        served = self.served
        pooling = Pooling(
            ask.pooling or served.pooling,
            served.normalize if ask.normalize is None else ask.normalize,
            bool(served.stages),
        )
        return VectorPrompt(ids, PromptExtras(pooling=pooling, second_from=second_from))

    def _limit(self, ask: VectorAsk) -> int:
        assert ask.max_tokens is not None
        if ask.max_tokens == -1:
            return self.max_length
        if not 1 <= ask.max_tokens <= self.max_length:
            raise InvalidRequest(
                f"texts are to be cut to {ask.max_tokens} tokens; expected 1 to {self.max_length}, or -1 for the most",
                param="truncate_prompt_tokens",
            )
        return ask.max_tokens

    def _left(self, ask: VectorAsk) -> bool:
        return self._cuts_left if ask.left is None else ask.left

    def _encoded(self, text: str | TextPair, ask: VectorAsk, limit: int, *, cut: bool) -> tokenizers.Encoding:
        raw = self._raw
        if raw is None:
            raise InvalidRequest("a text needs the tokenizer, which is off; send token ids", param=ask.param)
        first, second = text if isinstance(text, TextPair) else (text, None)
        if second is None and not first:
            raise InvalidRequest("the text is empty", param=ask.param)
        if not cut and len(first) + len(second or "") > _LETTERS_A_TOKEN * self.max_length:
            raise ContextTooLong(
                f"the text has {len(first) + len(second or '')} characters, far beyond {limit} tokens; shorten it, or "
                "ask for truncation",
                param=ask.param,
            )
        first = self._prefix(ask) + first
        if self.served.lower_case:
            first, second = first.lower(), None if second is None else second.lower()
        # `encode` would keep every other thread from running until it is done.
        (whole,) = raw.encode_batch_fast([first if second is None else (first, second)])
        if not cut or len(whole.ids) <= limit:
            return whole
        return self._cut(raw, first, second, limit, left=self._left(ask))

    def _in_template(self, pair: TextPair, ask: VectorAsk, limit: int, *, cut: bool) -> Sequence[int]:
        """A pair as the chat template writes it, behind a prompt as a system's message. Where it is too long and to be
        cut, the document loses its end."""
        if self._raw is None or self._template is None:
            raise InvalidRequest(
                "the pair needs the model's chat template and tokenizer, and there is none; give --chat-template a "
                "file that writes messages of the roles query and document",
                param=ask.param,
            )
        system = self._prefix(ask)
        document = pair.second[: _LETTERS_A_TOKEN * limit] if cut else pair.second
        ids = self._rendered(system, pair.first, document)
        if not cut or len(ids) <= limit:
            return ids
        fits, most = 0, len(document)  # letters of the document
        while fits < most:
            letters = (fits + most + 1) // 2
            fitting = len(self._rendered(system, pair.first, document[:letters])) <= limit
            fits, most = (letters, most) if fitting else (fits, letters - 1)
        return self._rendered(system, pair.first, document[:fits])

    def _rendered(self, system: str, query: str, document: str) -> Sequence[int]:
        assert self._raw is not None and self._template is not None
        texts = {"system": system, "query": query, "document": document}
        messages = [{"role": role, "content": text} for role, text in texts.items() if text or role != "system"]
        written = self._template.render(messages, add_generation_prompt=False)
        (encoding,) = self._raw.encode_batch_fast([written], add_special_tokens=False)
        ids: Sequence[int] = encoding.ids
        return ids

    def _cut(
        self, raw: tokenizers.Tokenizer, first: str, second: str | None, limit: int, *, left: bool
    ) -> tokenizers.Encoding:
        """As transformers cuts: special tokens stay, and of a pair the longer text loses first."""
        texts = [first] if second is None else [first, second]
        whole, *others = raw.encode_batch_fast(texts, add_special_tokens=False)
        room = limit - raw.num_special_tokens_to_add(bool(others))
        if room < len(texts):
            raise InvalidRequest(
                f"{limit} tokens leave no room for text beside {limit - room} special ones",
                param="truncate_prompt_tokens",
            )
        side = "left" if left else "right"
        if not others:
            whole.truncate(room, direction=side)
            return raw.post_process(whole)
        (other,) = others
        lengths = _shares(len(whole.ids), len(other.ids), room)
        whole.truncate(lengths[0], direction=side)
        other.truncate(lengths[1], direction=side)
        return raw.post_process(whole, other)

    def _prefix(self, ask: VectorAsk) -> str:
        if ask.prompt is not None:
            return ask.prompt
        name, known = ask.prompt_name or self.served.default_prompt, self.served.prompts
        if name is None:
            return ""
        if name not in known:
            among = f"known are {', '.join(map(repr, known))}" if known else "the model's files have none"
            raise InvalidRequest(f"prompt_name is {name[:200]!r}; {among}", param="prompt_name")
        return known[name]


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """Tokens of a pair's texts that fit: the shorter one is whole while it has at most half of the room."""
    shorter = min(first, second)
    longer = max(shorter, room - shorter) if shorter <= room else shorter
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    elif first + second <= room:
        return first, second
    return (shorter, longer) if first <= second else (longer, shorter)
