"""The workload: prompts of random token ids, the same for the same seed on every machine."""

from __future__ import annotations

import math
import random
from typing import Literal

import msgspec

from anychip.errors import ConfigError
from anychip.sampling_params import SamplingParams

_SIGMA = 0.9
_LONGEST = 8
_NEXT_TURNS = 0.4

_FIRST_ID = 3
"""Below it vocabularies keep their special tokens."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """`spread` 0.5: lengths are uniform within 50 % around their means. `shared` tokens begin every prompt.

    `mix` "chat": lengths as conversations have them, made here and of nobody's data. They are log-normal around the
    medians input_len and output_len, at most eight times as long; two prompts of five go on from an earlier one and
    its answer, as a conversation's next turn does.
    """

    num_prompts: int
    input_len: int
    output_len: int
    spread: float = 0.0
    shared: int = 0
    mix: Literal["uniform", "chat"] = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "output_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if not 0 <= self.spread < 1:
            raise ConfigError(f"spread is {self.spread}; expected 0 or more, below 1")
        if not 0 <= self.shared <= self.input_len:
            raise ConfigError(f"shared is {self.shared}; expected 0 to input_len, {self.input_len}")

    def requests(self, vocab_size: int) -> list[tuple[list[int], SamplingParams]]:
        """Greedy requests that run to their length."""
        rng = random.Random(self.seed)

        def ids(count: int) -> list[int]:
            return [rng.randrange(_FIRST_ID, vocab_size) for _ in range(count)]

        def length(typical: int) -> int:
            if self.mix == "chat":
                return max(1, min(_LONGEST * typical, round(rng.lognormvariate(math.log(typical), _SIGMA))))
            return max(1, round(typical * rng.uniform(1 - self.spread, 1 + self.spread)))

        beginning = ids(self.shared)
        made: list[tuple[list[int], SamplingParams]] = []
        for _ in range(self.num_prompts):
            earlier: list[int] = []
            if self.mix == "chat" and made and rng.random() < _NEXT_TURNS:
                before, sampling = rng.choice(made)
                earlier = (before + ids(sampling.max_tokens or 0))[: _LONGEST * self.input_len]
            prompt = (earlier or beginning) + ids(max(1, length(self.input_len) - self.shared))
            made.append((prompt, SamplingParams(temperature=0, max_tokens=length(self.output_len), ignore_eos=True)))
        return made
