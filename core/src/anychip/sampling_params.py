"""How a request's tokens are chosen and when it ends: one validated value, free of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from anychip.errors import InvalidRequest
from anychip.types import MAX_BIASES, MAX_LOGPROBS

MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 512
MAX_BAD_WORDS = 256
MAX_BEAMS = MAX_LOGPROBS // 2
"""A beam is continued by the best of twice as many tokens as there are beams."""

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]


class StructuredOutput(msgspec.Struct, frozen=True):
    """What the output must look like. `value`: the JSON schema or the list of choices as JSON, the regular
    expression, or a grammar in Lark's or GBNF's notation; "" for json_object."""

    kind: GrammarKind
    value: str = ""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Values are checked at construction; InvalidRequest names the first that is out of range.

    temperature 0 is greedy. top_k 0 and top_p 1 admit every token; min_p admits tokens whose probability is
    at least min_p times the largest. `max_tokens` None means as many as the context holds. `logprobs` asks
    for the log-probability of the chosen token and of that many most likely ones (0: the chosen one only),
    of the model's distribution before penalties, temperature and truncation; `prompt_logprobs` asks for the same of
    the prompt's tokens.

    A token's logit is divided by `repetition_penalty` where it is positive and multiplied where it is negative, once
    the token stands in prompt or output; then `logit_bias` is added, and for tokens of the output `presence_penalty`
    and `frequency_penalty` times their count are taken off. `bad_words` may not be completed, `allowed_token_ids`
    are all that may be drawn.

    `beam_width` above 0 searches with that many beams instead of sampling, and returns the best n; a hypothesis's
    score is its log-probability over its length to the power of `length_penalty`.

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
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = {}
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    structured: StructuredOutput | None = None
    beam_width: int = 0
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        _check("n", self.n, lambda v: 1 <= v <= MAX_N, f"1 to {MAX_N}")
        _check("temperature", self.temperature, lambda v: 0 <= v <= 100, "0 to 100")
        _check("top_p", self.top_p, lambda v: 0 < v <= 1, "above 0, up to 1")
        _check("top_k", self.top_k, lambda v: 0 <= v < 2**31, "0 (off) or more, in 31 bits")
        _check("min_p", self.min_p, lambda v: 0 <= v <= 1, "0 to 1")
        if self.seed is not None:
            _check("seed", self.seed, lambda v: -(2**63) <= v < 2**63, "a signed 64-bit integer")
        if self.max_tokens is not None:
            _check("max_tokens", self.max_tokens, lambda v: v >= 1, "1 or more")
        _check("min_tokens", self.min_tokens, lambda v: 0 <= v < 2**31, "0 or more, in 31 bits")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}", param="min_tokens"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), lambda v: 0 <= v <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
        _check("repetition_penalty", self.repetition_penalty, lambda v: 0 < v <= 10, "above 0, up to 10")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), lambda v: -2 <= v <= 2, "-2 to 2")
        self._check_tokens()
        self._check_beams()
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"{len(self.stop)} stop strings, at most {MAX_STOP_STRINGS}", param="stop")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise InvalidRequest(
                    f"a stop string has {len(text)} characters, 1 to {MAX_STOP_LENGTH} are allowed",
                    param="stop",
                )

    def _check_tokens(self) -> None:
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                _check(name, token, lambda v: 0 <= v < 2**31, "token ids")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids is empty: no token could be drawn", param="allowed_token_ids")
        if len(self.logit_bias) > MAX_BIASES:
            raise InvalidRequest(
                f"logit_bias has {len(self.logit_bias)} entries, at most {MAX_BIASES}", param="logit_bias"
            )
        for token, bias in self.logit_bias.items():
            _check("logit_bias", token, lambda v: 0 <= v < 2**31, "token ids")
            _check("logit_bias", bias, lambda v: -100 <= v <= 100, "biases of -100 to 100")
        if len(self.bad_words) > MAX_BAD_WORDS or not all(1 <= len(w) <= MAX_STOP_LENGTH for w in self.bad_words):
            raise InvalidRequest(
                f"bad_words may hold {MAX_BAD_WORDS} texts of 1 to {MAX_STOP_LENGTH} characters", param="bad_words"
            )

    def _check_beams(self) -> None:
        _check("beam_width", self.beam_width, lambda v: 0 <= v <= MAX_BEAMS, f"0 (off) to {MAX_BEAMS}")
        _check("length_penalty", self.length_penalty, lambda v: -10 <= v <= 10, "-10 to 10")
        if self.beam_width and self.n > self.beam_width:
            raise InvalidRequest(f"n is {self.n}, above the {self.beam_width} beams", param="n")
        if self.beam_width and self.structured is not None:
            raise InvalidRequest("beam search takes no structured output", param="beam_width")

    @property
    def num_sequences(self) -> int:
        """Sequences that run at once."""
        return self.beam_width or self.n

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


def _check(name: str, value: float, allowed: Callable[[float], bool], expected: str) -> None:
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not is_number:
        raise InvalidRequest(f"{name} is {value!r}; expected {expected}", param=name)
    if not allowed(value):
        shown = value if isinstance(value, float) or abs(value) < 2**64 else "beyond 64 bits"
        raise InvalidRequest(f"{name} is {shown}; expected {expected}", param=name)
