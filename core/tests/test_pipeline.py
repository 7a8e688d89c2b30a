"""Stages of a pipeline give the tokens of one rank, whatever families, groups of layers and ways to schedule meet."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import pytest
from test_equality import Oracles
from thread_ranks import RankThread

from anychip_conformance.equality.oracle import judge
from anychip_conformance.equality.tiny_models import FAMILIES
from anychip_conformance.equality.workload import Case, cover, generate, open_llm


class Way(NamedTuple):
    """Of running a model over stages."""

    family: str
    layers: str  # of each stage, and ranks that share them
    budget: int
    prefix_caching: bool
    preemption: bool
    overlap: bool

    @property
    def settings(self) -> dict[str, object]:
        layers, _, ranks = self.layers.partition("x")
        each = tuple(map(int, layers.split("+")))
        sizes = {"pipeline_parallel_size": len(each), "tensor_parallel_size": int(ranks or 1)}
        return {"device": "cpu", "executor": "multiprocess", "pipeline_layers": each, **sizes}


LAYERS = ("1+3", "2+1+1", "2+2x2")
"""Layers of each stage: uneven, of two stages and of three, and two stages of two ranks each."""
FEW = ("llama", "gemma3", "qwen3-moe", "deepseek-v2", "falcon-h1")
"""Of every kind of layer: dense, with windows, with experts, latent, with states."""
EVERY_CUT = ("llama", "qwen3-moe")


def ways(families: tuple[str, ...]) -> list[Way]:
    flags = (True, False)
    return [Way(*values) for values in product(families, LAYERS, (7, 64), flags, flags, flags)]


def covering() -> list[Way]:
    """Every pair of two settings' values stands together in some case, but that some families do not meet every way to
    cut them into stages: the full product has those."""

    def pairs(way: Way) -> set[tuple[int, object, int, object]]:
        places = list(combinations(range(len(way)), 2))
        if way.family not in EVERY_CUT:
            places.remove((0, 1))
        return {(i, way[i], j, way[j]) for i, j in places}

    return cover(ways(FEW), pairs)


def full_product() -> list[Way]:
    """The product of the few families, and of every family each way to cut it."""
    others = tuple(family for family in FAMILIES if family not in FEW)
    once = [Way(family, layers, 64, True, True, True) for family, layers in product(others, LAYERS)]
    return [*ways(FEW), *once]


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    return Oracles(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anychip.launch.build.Child", RankThread)


def check(way: Way, oracles: Oracles) -> None:
    checkpoint, answers = oracles.get(way.family)
    case = Case(way.family, way.budget, way.prefix_caching, way.preemption, way.overlap, "cpu")
    with open_llm(case, Path(checkpoint), **way.settings) as llm:
        verdicts = [judge(answer, tokens) for answer, tokens in zip(answers, generate(llm), strict=True)]
        scheduler = llm.engine.scheduler
        assert not way.preemption or scheduler.num_preemptions > 0
        assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_usable
    wrong = {i: v.divergence for i, v in enumerate(verdicts) if v.divergence is not None and not v.excused}
    assert not wrong, f"requests diverge, by index of the first different token: {wrong}"


@pytest.mark.parametrize("way", covering(), ids=lambda way: "-".join(map(str, way)))
def test_greedy_tokens_over_stages_equal_transformers(way: Way, oracles: Oracles, threads: None) -> None:
    check(way, oracles)


@pytest.mark.full
@pytest.mark.parametrize("way", full_product(), ids=lambda way: "-".join(map(str, way)))
def test_greedy_tokens_over_stages_equal_transformers_in_the_full_product(
    way: Way, oracles: Oracles, threads: None
) -> None:
    check(way, oracles)
