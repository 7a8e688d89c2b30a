"""Which requests beyond text in and text out an engine serves, and what it checks of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anychip.errors import InvalidRequest
from anychip.messages import AddRequest
from anychip.prompt_extras import NUM_AXES, POOLING_KINDS, PromptExtras

_FLOAT_BYTES = _INT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedExtras:
    """As the configuration and the model have it."""

    pooling: bool = False
    max_embeddings: int = 0
    hidden_size: int = 0
    max_position: int = 0
    """Above every rotary position; 0: positions have no axes."""


NO_EXTRAS = ServedExtras()


def check_extras(message: AddRequest, extras: PromptExtras, served: ServedExtras) -> None:
    """Raises InvalidRequest for what the engine was not started for, and for sizes that do not fit together."""
    if extras.pooling is not None:
        _check_pooling(message, extras, served)
    if extras.embedded or extras.embeddings:
        _check_embeddings(message, extras, served)
    if extras.positions:
        _check_positions(message, extras, served)
    if extras.second_from is not None and not 0 <= extras.second_from < message.num_prompt:
        raise InvalidRequest(
            f"a pair's second text begins at {extras.second_from}; the prompt has {message.num_prompt} tokens"
        )


def _check_pooling(message: AddRequest, extras: PromptExtras, served: ServedExtras) -> None:
    assert extras.pooling is not None
    if not served.pooling:
        raise InvalidRequest("the engine serves no vectors; start it with pooling (--pooling)", param="pooling")
    if extras.pooling.kind not in POOLING_KINDS:
        raise InvalidRequest(
            f"pooling is {extras.pooling.kind!r}; known are {', '.join(POOLING_KINDS)}", param="pooling"
        )
    sampling = message.sampling
    for name, asked in (
        ("n", sampling.num_sequences > 1),
        ("structured output", sampling.structured is not None),
        ("prompt_logprobs", sampling.prompt_logprobs is not None),
    ):
        if asked:
            raise InvalidRequest(f"a request for a vector draws no text: leave {name} out", param="pooling")


def _check_embeddings(message: AddRequest, extras: PromptExtras, served: ServedExtras) -> None:
    count = extras.num_embedded
    at_once = count * max(1, message.sampling.beam_width)  # beams run together, and each has rows of its own
    if at_once > served.max_embeddings:
        raise InvalidRequest(
            f"{at_once} tokens bring embeddings at once; the engine takes {served.max_embeddings} at most "
            "(--max-embeddings)",
            param="embeddings",
        )
    nbytes = count * served.hidden_size * _FLOAT_BYTES
    if len(extras.embeddings) != nbytes:
        raise InvalidRequest(
            f"{count} embeddings of {served.hidden_size} float32 numbers are {nbytes} bytes, and "
            f"{len(extras.embeddings)} came",
            param="embeddings",
        )
    if not np.isfinite(np.frombuffer(extras.embeddings, dtype=np.float32)).all():
        raise InvalidRequest("an embedding holds a number that is not finite", param="embeddings")
    if extras.embedded != tuple((span.start, span.length) for span in message.media):
        raise InvalidRequest("each span of embeddings is a media span with its digest, in order", param="embeddings")


def _check_positions(message: AddRequest, extras: PromptExtras, served: ServedExtras) -> None:
    if not served.max_position:
        raise InvalidRequest("the model's rotary positions have no axes", param="positions")
    nbytes = NUM_AXES * message.num_prompt * _INT_BYTES
    if len(extras.positions) != nbytes:
        raise InvalidRequest(
            f"{NUM_AXES} int32 positions of {message.num_prompt} tokens are {nbytes} bytes, and "
            f"{len(extras.positions)} came",
            param="positions",
        )
    positions = np.frombuffer(extras.positions, dtype=np.int32)
    if positions.min() < 0 or positions.max() + message.max_output > served.max_position:
        raise InvalidRequest(
            f"positions lie between {positions.min()} and {positions.max()}, and {message.max_output} tokens follow; "
            f"the model has {served.max_position} positions",
            param="positions",
        )
    plain = message.media[0].start if message.media else message.num_prompt
    if (positions.reshape(NUM_AXES, -1)[:, :plain] != np.arange(plain)).any():
        # The prefix cache tells prompts apart by tokens and media: others may share what stands before these.
        raise InvalidRequest("before the first media span, a token's positions are its place", param="positions")
