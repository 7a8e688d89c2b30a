"""What of a prompt is not tokens, and what is wanted of it that is not tokens. Values and their checks only."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

PoolingKind = Literal["last", "mean", "cls"]
POOLING_KINDS: tuple[str, ...] = get_args(PoolingKind)

NO_TAPS = 2**31 - 1

NUM_AXES = 3
"""Axes of rotary positions where a model has any: time, height and width."""


class Pooling(msgspec.Struct, frozen=True, array_like=True):
    """A request for one vector: the final hidden state of the prompt's last token, of its first, or the mean over all.
    Normalized, the vector's length is 1."""

    kind: PoolingKind = "last"
    normalize: bool = True
    head: bool = False
    """Whether the model's own head, such as a classifier, is applied to the vector before it is normalized."""

    def tokens(self, num_prompt: int) -> tuple[int, int]:
        """First position whose hidden state counts, and the one behind the last."""
        return {"last": (num_prompt - 1, num_prompt), "mean": (0, num_prompt), "cls": (0, 1)}[self.kind]


class PromptExtras(msgspec.Struct, frozen=True, array_like=True):
    """One request's. It crosses to the engine and to the workers as it is."""

    pooling: Pooling | None = None
    """Not None: the request ends with a vector when its prompt is computed, and draws nothing."""
    embedded: tuple[tuple[int, int], ...] = ()
    """(start, length) of the prompt's spans that take embeddings in place of their tokens', in order."""
    embeddings: bytes = b""
    """float32 [num_embedded, hidden_size]: what the first layer reads at the spans' tokens, in their order."""
    positions: bytes = b""
    """int32 [3, num_prompt]: rotary positions by axis (M-RoPE); b"": each token's place in the text, on all axes."""
    tap_from: int = NO_TAPS
    """First position whose hidden states go to who reads the worker's taps."""
    second_from: int | None = None
    """First position of a pair's second text; None: the prompt is no pair, or the model does not tell them apart."""

    @property
    def num_embedded(self) -> int:
        return sum(length for _, length in self.embedded)

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether hidden states of tokens before the last are wanted: such a request takes no prefix hits."""
        return self.pooling is not None and self.pooling.kind != "last"
