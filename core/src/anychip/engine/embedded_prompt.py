"""A prompt some of whose tokens bring embeddings of their own, and what becomes of it in a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import msgspec
import numpy as np

from anychip.errors import InvalidRequest
from anychip.prefix import MediaSpan
from anychip.prompt_extras import NUM_AXES, PromptExtras


@dataclass(frozen=True, slots=True)
class EmbeddedSpan:
    """Tokens of a prompt from `start` on, and what the model's first layer reads there."""

    start: int
    values: np.ndarray  # [num_tokens, hidden_size] float32


@dataclass(frozen=True, slots=True)
class EmbeddedPrompt:
    """`token_ids` has a token, whichever, at each place of a span. `positions` [3, num_prompt] are rotary positions by
    axis, for models that have them; None: each token's place in the prompt.

    Example:
        EmbeddedPrompt([1, 0, 0, 9], [EmbeddedSpan(1, np.zeros((2, 896), np.float32))])
    """

    token_ids: Sequence[int]
    spans: Sequence[EmbeddedSpan]
    positions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    def media(self) -> tuple[MediaSpan, ...]:
        """Prompts share what stands before the first difference in embeddings or positions: a span's digest is over
        its values, and over the positions up to the next span."""
        if not self.spans:
            return ()
        ends = [span.start for span in self.spans[1:]] + [len(self.token_ids)]
        return tuple(
            MediaSpan(span.start, len(span.values), self._digest(span, end))
            for span, end in zip(self.spans, ends, strict=True)
        )

    def extras(self, others: PromptExtras | None) -> PromptExtras:
        """With what else the request asks for."""
        values = [np.ascontiguousarray(span.values, dtype=np.float32) for span in self.spans]
        if any(each.ndim != 2 for each in values):
            raise InvalidRequest("a span's values are [num_tokens, hidden_size]", param="embeddings")
        return msgspec.structs.replace(
            others or PromptExtras(),
            embedded=tuple((span.start, len(each)) for span, each in zip(self.spans, values, strict=True)),
            embeddings=b"".join(each.tobytes() for each in values),
            positions=b"" if self.positions is None else self._positions().tobytes(),
        )

    def _positions(self) -> np.ndarray:
        given = np.ascontiguousarray(self.positions, dtype=np.int32)
        if given.shape != (NUM_AXES, len(self.token_ids)):
            raise InvalidRequest(
                f"positions are {list(given.shape)}; the prompt's would be {[NUM_AXES, len(self.token_ids)]}",
                param="positions",
            )
        return given

    def _digest(self, span: EmbeddedSpan, end: int) -> bytes:
        digest = sha256(b"embeddings")
        digest.update(np.ascontiguousarray(span.values, dtype=np.float32).tobytes())
        if self.positions is not None:
            digest.update(b"positions" + np.ascontiguousarray(self._positions()[:, span.start : end]).tobytes())
        return digest.digest()
