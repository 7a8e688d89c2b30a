"""Models whose experts lie on several ranks give the tokens of one process; what cannot be spread is refused."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from judged import Oracles, as_expected
from ranks_in_threads import on_ranks

from anychip import SamplingParams
from anychip.config import EngineConfig
from anychip.engine_stats import EngineStats
from anychip.errors import ConfigError, Unsupported
from anychip.launch.plan import plan_engine
from anychip.model_config import load_model_config
from anychip.observability.metrics import Metrics
from anychip.ops.table import resolve_platform_ops
from anychip.plugin_api import Mesh, MeshShape
from anychip.step_messages import ExpertStats
from anychip.worker.model_source import CheckpointSource
from anychip_conformance.device import open_device
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import NUM_TOKENS, Case, open_llm, prompts

FAMILIES = ("mixtral", "qwen3-moe", "gpt-oss", "deepseek-v2", "deepseek-v3", "glm4-moe", "olmoe")
OTHERS = ("granite-moe", "qwen2-moe", "minimax-m2", "jamba", "minimax")
"""Families with experts whose layers differ from those in little."""
SPREAD: dict[str, dict[str, Any]] = {
    "ep2": {"tensor_parallel_size": 2, "expert_parallel": True},
    "ep4": {"tensor_parallel_size": 4, "expert_parallel": True},
    "ep2-moving": {
        "tensor_parallel_size": 2,
        "expert_parallel": True,
        "eplb_interval": 4,
        "num_redundant_experts": 2,
    },
    "mesh": {"device": "fake-mesh", "expert_parallel": True},
}


@dataclass(frozen=True)
class Spread:
    case: Case
    over: str

    def __str__(self) -> str:
        return f"{self.over}-{self.case}"


def spread(family: str, over: str, prefix: bool, preemption: bool, overlap: bool, budget: int = 64) -> Spread:
    return Spread(Case(family, budget, prefix, preemption, overlap, "cpu"), over)


SAMPLE = [
    spread("gpt-oss", "ep2", True, True, True),
    spread("deepseek-v3", "ep2-moving", True, True, True),
]
PRODUCT = [
    spread(family, over, *switches)
    for family in (*FAMILIES, *OTHERS)
    for over in SPREAD
    for switches in itertools.product((True, False), repeat=3)
    if not (over == "ep4" and family in OTHERS)
]


def check(each: Spread, oracles: Oracles) -> None:
    checkpoint, answers = oracles.get(each.case.family)
    with open_llm(each.case, checkpoint, **SPREAD[each.over]) as llm:
        as_expected(answers, llm)
        scheduler = llm.engine.scheduler
        if each.case.preemption:
            assert scheduler.num_preemptions > 0, "the case was to force preemption"
        if each.over == "ep2-moving":
            assert scheduler.stats.experts.moved > 0, "the case was to move experts"


@pytest.mark.parametrize("each", SAMPLE, ids=str)
def test_experts_on_several_ranks_give_the_tokens_of_one_process(each, oracles):
    check(each, oracles)


@pytest.mark.full
@pytest.mark.parametrize("each", PRODUCT, ids=str)
def test_experts_on_several_ranks_give_the_tokens_of_one_process_in_the_full_product(each, oracles):
    check(each, oracles)


@pytest.mark.full
def test_log_probabilities_are_the_same_to_the_bit_while_experts_move(oracles):
    """An engine whose experts stay, though they could move, and one whose experts move every few steps."""
    checkpoint, _ = oracles.get("deepseek-v3")
    found = []
    for interval in (100_000, 3):
        case = Case("deepseek-v3", 64, True, False, True, "cpu")
        settings = {**SPREAD["ep2-moving"], "eplb_interval": interval, "num_redundant_experts": 0}
        with open_llm(case, checkpoint, **settings) as llm:
            sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=4)
            outputs = [output.outputs[0] for output in llm.generate(prompts(), sampling)]
            found.append([(output.token_ids, output.logprobs) for output in outputs])
            experts = llm.engine.scheduler.stats.experts
    assert experts.moved > 0
    assert found[0] == found[1]


# -- weights ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cpu():
    device = open_device("cpu", {})
    yield device
    device.close()


def built(path, cpu, ranks: int, **settings: Any) -> list[Any]:
    """Every rank's model."""
    config = EngineConfig(model=str(path), device="cpu", dtype="float32", expert_parallel=True, **settings)
    shape = MeshShape(tp=ranks, joined={"ep": ("tp",)})

    def one(communicator, rank):
        source = CheckpointSource(
            config=config,
            model=load_model_config(str(path)),
            platform=cpu.platform,
            ops=resolve_platform_ops(cpu.platform),
            contributed={},
        )
        read = []
        views = source.checkpoint.views

        def watched():
            for name, view in views():
                yield name, Watched(view, name, read)

        source.checkpoint.views = watched
        return source.build(Mesh(shape, rank, communicator)), read

    return on_ranks(ranks, one)


class Watched:
    """A weight that notes its name where it is read."""

    def __init__(self, view, name, read):
        self._view, self._name, self._read = view, name, read

    def __getattr__(self, attribute):
        return getattr(self._view, attribute)

    def read(self, *bounds):
        self._read.append((self._name, bounds))
        return self._view.read(*bounds)


def test_a_rank_reads_whole_experts_and_its_own_alone(oracles, cpu):
    checkpoint, _ = oracles.get("qwen3-moe")
    for rank, (model, read) in enumerate(built(checkpoint, cpu, 2)):
        layer = model.expert_layers[0]
        count = layer.spec.num_experts
        assert layer.spec.num_held == count // 2
        assert layer.spec.intermediate_size == model.config.need("moe_intermediate_size")
        seen = {int(name.partition("experts.")[2].partition(".")[0]) for name, _ in read if "experts." in name}
        assert seen == set(range(rank * count // 2, (rank + 1) * count // 2))


def test_stacked_experts_are_read_where_a_ranks_own_lie(oracles, cpu):
    checkpoint, _ = oracles.get("gpt-oss")
    for rank, (model, read) in enumerate(built(checkpoint, cpu, 2)):
        half = model.expert_layers[0].spec.num_experts // 2
        bounds = [bounds[0] for name, bounds in read if "experts." in name]
        assert bounds and all(rank * half <= first and last <= (rank + 1) * half for first, last in bounds)


# -- what is refused ----------------------------------------------------------------------------------------


def test_a_model_without_experts_is_refused_by_name(tmp_path, cpu):
    make_checkpoint("llama", tmp_path)
    with pytest.raises(ConfigError, match="LlamaForCausalLM: expert_parallel: it has no experts that ranks could"):
        built(tmp_path, cpu, 2)
    with pytest.raises(ConfigError, match="LlamaForCausalLM: expert_parallel"):
        plan_engine(EngineConfig(model=str(tmp_path), device="cpu", tensor_parallel_size=2, expert_parallel=True))


def test_experts_that_do_not_divide_are_refused_with_what_would(tmp_path, cpu):
    make_checkpoint("mixtral", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_local_experts": 6}))
    with pytest.raises(ConfigError, match=r"6 experts of .*_moe do not split evenly over 4 ranks; 1, 2, 3, 6 would"):
        built(tmp_path, cpu, 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"expert_parallel": True}, "expert_parallel spreads experts over ranks, and there is 1"),
        (
            {
                "expert_parallel": True,
                "tensor_parallel_size": 2,
                "eplb_interval": 10,
                "num_redundant_experts": 3,
            },
            "3 redundant experts do not split evenly over 2 ranks; give 2 or 4",
        ),
        ({"device": "fake-spmd", "expert_parallel": True}, "fake-spmd: expert_parallel: .* tp 4, without ep"),
        ({"device": "fake-mesh", "expert_parallel": True, "eplb_interval": 5}, "its step program cannot move experts"),
    ],
)
def test_meshes_without_a_place_for_experts_are_refused(oracles, settings, said):
    checkpoint, _ = oracles.get("qwen3-moe")
    with pytest.raises((ConfigError, Unsupported), match=said):
        plan_engine(EngineConfig(**{"model": str(checkpoint), "device": "cpu", **settings}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eplb_interval": 10}, "which takes expert_parallel"),
        ({"expert_parallel": True, "num_redundant_experts": 2}, "give an eplb_interval"),
        ({"expert_parallel": True, "eplb_interval": 0}, "eplb_interval is 0; expected 1 or more"),
        ({"expert_parallel": True, "pipeline_parallel_size": 2}, "leave one of them out"),
    ],
)
def test_options_that_need_one_another_say_so(settings, said):
    with pytest.raises(ConfigError, match=said):
        EngineConfig(**settings)


def test_a_plan_counts_the_experts_that_a_rank_holds(oracles):
    checkpoint, _ = oracles.get("qwen3-moe")
    plans = {
        name: plan_engine(EngineConfig(model=str(checkpoint), device="cpu", dtype="float32", **settings))
        for name, settings in {"one": {}, **{name: SPREAD[name] for name in ("ep2", "ep2-moving")}}.items()
    }
    held = {name: plan.worker.memory.weights for name, plan in plans.items()}
    assert held["ep2"] < held["ep2-moving"] < held["one"]


# -- what is seen of it -------------------------------------------------------------------------------------


def test_metrics_show_the_imbalance_and_the_moves():
    metrics = Metrics("m")
    stats = EngineStats(1, 0, 0, 1, 10, 5, 0, 0, 0)

    def take(steps: int, experts: ExpertStats | None) -> str:
        metrics.take(msgspec.structs.replace(stats, steps=steps, experts=experts))
        return metrics.render().decode()

    take(5, ExpertStats(2.5, 1.05, 0))
    take(7, ExpertStats(2.5, 1.05, 6))
    text = take(6, ExpertStats(2.5, 1.05, 4))  # an older word
    assert 'anychip_expert_imbalance_ratio{model_name="m"} 2.5' in text
    assert 'anychip_expert_moves_total{model_name="m"} 6.0' in text
    assert 'anychip_expert_moves_total{model_name="m"} 6.0' in take(8, None)
