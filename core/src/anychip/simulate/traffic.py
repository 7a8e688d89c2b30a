"""The requests of a simulation: lengths and arrivals, the same for the same seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from anychip.errors import ConfigError

Phase = Literal["both", "prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """`at` in seconds."""

    at: float
    num_prompt: int
    num_output: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """`rate`: requests a second, at random; None: all at once. `spread` 0.5: lengths are uniform within 50 % around
    their means. `phase` "prefill": one token is drawn of each; "decode": prompts were computed elsewhere and cost
    nothing here, as where prefill and decode are apart."""

    num_requests: int
    input_len: int
    output_len: int
    spread: float = 0.0
    rate: float | None = None
    phase: Phase = "both"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_requests", "input_len", "output_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if not 0 <= self.spread < 1:
            raise ConfigError(f"spread is {self.spread}; expected 0 or more, below 1")
        if self.rate is not None and self.rate <= 0:
            raise ConfigError(f"rate is {self.rate}; expected more than 0, or nothing for all at once")

    @property
    def longest(self) -> int:
        """Tokens of the longest request that there may be."""
        return sum(round(length * (1 + self.spread)) for length in (self.input_len, self.output_len))

    def arrivals(self) -> list[Arrival]:
        """In the order of their times."""
        rng = random.Random(self.seed)

        def length(mean: int) -> int:
            return max(1, round(mean * rng.uniform(1 - self.spread, 1 + self.spread)))

        at, made = 0.0, []
        for _ in range(self.num_requests):
            output = 1 if self.phase == "prefill" else length(self.output_len)
            made.append(Arrival(at=at, num_prompt=length(self.input_len), num_output=output))
            at += 0.0 if self.rate is None else rng.expovariate(self.rate)
        return made
