"""Prompts as int32 bytes, and whether a vocabulary has their ids."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from anychip.errors import InvalidRequest


def packed(token_ids: Sequence[int], vocab_size: int) -> bytes:
    """int32 bytes [num_ids]. Raises InvalidRequest for an id outside the vocabulary, and where there is none."""
    try:
        prompt = array("i", token_ids).tobytes()
    except OverflowError:
        raise _unknown(next(token for token in token_ids if not 0 <= token < vocab_size), vocab_size) from None
    check_token_ids(prompt, vocab_size)
    return prompt


def check_token_ids(prompt: bytes, vocab_size: int) -> None:
    """Raises InvalidRequest for an id outside the vocabulary, and where there is none. `prompt`: int32 ids."""
    ids = np.frombuffer(prompt, dtype=np.int32)
    if not len(ids):
        raise InvalidRequest("the prompt is empty", param="prompt")
    if ids.view(np.uint32).max() >= vocab_size:  # as an unsigned number, a negative id is beyond any vocabulary
        raise _unknown(int(ids[(ids < 0) | (ids >= vocab_size)][0]), vocab_size)


def _unknown(token: int, vocab_size: int) -> InvalidRequest:
    return InvalidRequest(f"the prompt holds token id {token}; the vocabulary has {vocab_size}", param="prompt")
