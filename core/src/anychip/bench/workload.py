"""The workload: prompts of random token ids, the same for the same seed on every machine."""

from __future__ import annotations

import random

import msgspec

from anychip.errors import ConfigError
from anychip.sampling_params import SamplingParams

_FIRST_ID = 3
"""Below it vocabularies keep their special tokens."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """`spread` 0.5: lengths are uniform within 50 % around their means. `shared` tokens begin every prompt."""

    num_prompts: int
    input_len: int
    output_len: int
    spread: float = 0.0
    shared: int = 0
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

        def length(mean: int) -> int:
            return max(1, round(mean * rng.uniform(1 - self.spread, 1 + self.spread)))

        beginning = ids(self.shared)
        made = []
        for _ in range(self.num_prompts):
            prompt = beginning + ids(max(1, length(self.input_len) - self.shared))
            made.append((prompt, SamplingParams(temperature=0, max_tokens=length(self.output_len), ignore_eos=True)))
        return made
