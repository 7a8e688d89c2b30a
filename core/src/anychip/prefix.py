"""What tells prompts with the same token ids apart: their root, and the media that stand in them. Values and their
checks only: kv_cache/hashing makes the prefix cache's keys of them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from anychip.errors import InvalidRequest

DIGEST_BYTES = 32
"""Of a SHA-256 digest."""


class PrefixRoot(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for a prompt as a whole. Prompts whose roots differ share no block."""

    adapter: bytes | None = None
    """Digest of the adapter's configuration and weights; None: the model without any."""
    weights_version: int = 0
    """How often the model's weights have changed in place since the engine's start."""
    salt: str = ""
    """The request's own: who does not know it finds nothing of this prompt."""


PLAIN_ROOT = PrefixRoot()


class MediaSpan(msgspec.Struct, frozen=True, array_like=True):
    """`length` tokens of a prompt, from `start` on, that stand for one image, video or sound. `digest` is over what
    the model sees of it: the bytes, and how they are processed."""

    start: int
    length: int
    digest: bytes


def check_prefix(adapter: bytes | None, media: Sequence[MediaSpan], num_prompt: int) -> None:
    """Raises InvalidRequest for a digest of the wrong size, and for spans that are empty, out of order, one over the
    other or beyond the prompt's `num_prompt` tokens."""
    if adapter is not None and len(adapter) != DIGEST_BYTES:
        raise InvalidRequest(f"the adapter's digest has {len(adapter)} bytes, not {DIGEST_BYTES}", param="adapter")
    free = 0
    for number, span in enumerate(media):
        if span.length < 1:
            raise InvalidRequest(f"media span {number} has {span.length} tokens; 1 is the least", param="media")
        end = span.start + span.length
        if span.start < free:
            raise InvalidRequest(
                f"media span {number} begins at token {span.start}; "
                + (f"the one before it ends at {free}" if number else "the prompt begins at 0"),
                param="media",
            )
        if end > num_prompt:
            raise InvalidRequest(
                f"media span {number} ends at token {end}; the prompt has {num_prompt} tokens", param="media"
            )
        if len(span.digest) != DIGEST_BYTES:
            raise InvalidRequest(
                f"the digest of media span {number} has {len(span.digest)} bytes, not {DIGEST_BYTES}", param="media"
            )
        free = end
