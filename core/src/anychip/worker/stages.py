"""Cuts a model into the stages of a pipeline: neighbouring layers, so that no stage takes much longer than another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from anychip.config import EngineConfig
from anychip.errors import ConfigError
from anychip.layers.stage import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCosts:
    """Bytes of weights, the whole model's. What a step reads of them is what it takes: a step of few tokens is bound by
    memory, and one of many multiplies all that it reads. Of the embedding a step reads a row for each token, so the
    embedding takes memory and no time."""

    layers: Sequence[int]
    embedding: int
    head: int
    tied: bool
    """Whether the head is the embedding: first and last stage then hold it."""

    def of(self, first: int, end: int) -> tuple[int, int]:
        """(what a step reads, what is held) of a stage with these layers."""
        read = sum(self.layers[first:end]) + (self.head if end == len(self.layers) else 0)
        table = self.embedding if first == 0 else 0
        twice = self.tied and first == 0 and end == len(self.layers)
        return read, read + (0 if twice else table)


def balanced(costs: StageCosts, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage: of all cuts one whose slowest stage is fastest; of those, one whose largest is smallest."""
    num_layers = len(costs.layers)
    best: dict[int, tuple[tuple[int, int], tuple[int, ...]]] = {0: ((0, 0), ())}  # by end of the stages so far
    for stage in range(1, num_stages + 1):
        reached: dict[int, tuple[tuple[int, int], tuple[int, ...]]] = {}
        ends = [num_layers] if stage == num_stages else range(stage, num_layers - (num_stages - stage) + 1)
        for end in ends:
            for start, (worst, counts) in best.items():
                if start >= end:
                    continue
                read, held = costs.of(start, end)
                found = ((max(worst[0], read), max(worst[1], held)), (*counts, end - start))
                if end not in reached or found < reached[end]:
                    reached[end] = found
        best = reached
    return best[num_layers][1]


def check_layers(config: EngineConfig, num_layers: int) -> None:
    """Raises ConfigError where the stages do not go with the model's layers."""
    given, num_stages = config.pipeline_layers, config.pipeline_parallel_size
    if num_stages > num_layers:
        raise ConfigError(
            f"pipeline_parallel_size is {num_stages}, and the model has {num_layers} layers; give {num_layers} or less"
        )
    if given and sum(given) != num_layers:
        raise ConfigError(
            f"pipeline_layers {','.join(map(str, given))} are {sum(given)} layers, and the model has {num_layers}; "
            "leave them out, and the stages are balanced"
        )


def stage_of(layers_each: Sequence[int], index: int) -> Stage:
    """One of the stages that have so many layers each."""
    ends = [0, *accumulate(layers_each)]
    end = None if index == len(layers_each) - 1 else ends[index + 1]
    return Stage(index=index, count=len(layers_each), first_layer=ends[index], end_layer=end)


def cache_places(layers_each: Sequence[int], caches_by_layer: Sequence[int]) -> list[range]:
    """By stage, which of the caches that the model's layers keep are its own."""
    first_cache = [0, *accumulate(caches_by_layer)]
    return [range(first_cache[a], first_cache[b]) for a, b in pairwise([0, *accumulate(layers_each)])]
