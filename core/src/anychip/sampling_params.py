"""How a request's tokens are chosen and when it ends: one validated value, free of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from anychip.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 512


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Values are checked at construction; InvalidRequest names the first that is out of range.

    temperature 0 is greedy. top_k 0 and top_p 1 admit every token; min_p admits tokens whose probability is
    at least min_p times the largest. `max_tokens` None means as many as the context holds. `logprobs` asks
    for the log-probability of the chosen token and of that many most likely ones (0: the chosen one only),
    of the model's distribution before temperature and truncation.

    Example: SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=64, stop=("\\n\\n",))
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check("n", self.n, lambda v: 1 <= v <= MAX_N, f"1 to {MAX_N}")
        _check("temperature", self.temperature, lambda v: 0 <= v <= 100, "0 to 100")
        _check("top_p", self.top_p, lambda v: 0 < v <= 1, "above 0, up to 1")
        _check("top_k", self.top_k, lambda v: v >= 0, "0 (off) or more")
        _check("min_p", self.min_p, lambda v: 0 <= v <= 1, "0 to 1")
        if self.seed is not None:
            _check("seed", self.seed, lambda v: -(2**63) <= v < 2**63, "a signed 64-bit integer")
        if self.max_tokens is not None:
            _check("max_tokens", self.max_tokens, lambda v: v >= 1, "1 or more")
        _check("min_tokens", self.min_tokens, lambda v: v >= 0, "0 or more")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}", param="min_tokens"
            )
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, lambda v: 0 <= v <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"{len(self.stop)} stop strings, at most {MAX_STOP_STRINGS}", param="stop")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise InvalidRequest(
                    f"a stop string has {len(text)} characters, 1 to {MAX_STOP_LENGTH} are allowed",
                    param="stop",
                )
        for token in self.stop_token_ids:
            _check("stop_token_ids", token, lambda v: 0 <= v < 2**31, "token ids")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


def _check(name: str, value: float, allowed: Callable[[float], bool], expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(f"{name} is {value!r}; expected {expected}", param=name)
    if not allowed(value):
        raise InvalidRequest(f"{name} is {value}; expected {expected}", param=name)
