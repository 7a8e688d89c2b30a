"""Data-parallel lanes give the tokens of one process; a lane without requests keeps nobody waiting."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from judged import Oracles, as_expected
from ranks_in_threads import on_ranks
from test_adapters import NAMES, Base, drawn
from test_pipeline import answers
from torch import Tensor

from anychip import LLM, EngineConfig, SamplingParams
from anychip.engine_stats import EngineStats, LaneStats
from anychip.entrypoints.cli.main import main
from anychip.errors import ConfigError, DeviceUnavailable, Unsupported
from anychip.launch.plan import plan_engine
from anychip.model_config import load_model_config
from anychip.observability.metrics import Metrics
from anychip.ops.table import resolve_platform_ops
from anychip.plugin_api import Mesh, MeshShape
from anychip.process_specs import WorkerSpec
from anychip.worker.model_source import CheckpointSource
from anychip_conformance.device import open_device
from anychip_conformance.equality.tiny_adapters import FIVE
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import Case, cover, open_llm

# -- what a mixture's layer does in a step --------------------------------------------------------------------


@pytest.fixture(scope="module")
def cpu() -> Any:
    device = open_device("cpu", {})
    yield device
    device.close()


def built(folder: Any, cpu: Any, mesh: Mesh) -> Any:
    config = EngineConfig(model=str(folder), device="cpu", dtype="float32")
    return CheckpointSource(
        config=config,
        model=load_model_config(str(folder)),
        platform=cpu.platform,
        ops=resolve_platform_ops(cpu.platform),
        contributed={},
    ).build(mesh)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_lane_without_tokens_runs_its_experts_on_those_of_the_others(tmp_path: Any, cpu: Any, tp: int) -> None:
    """First the one lane has tokens, then the other, then both, then neither."""
    make_checkpoint("deepseek-v3", tmp_path)
    shape = MeshShape(dp=2, tp=tp, joined={"ep": ("dp", "tp")})
    alone = built(tmp_path, cpu, Mesh.alone())
    hidden = alone.expert_layers[0].spec.hidden_size
    given: list[list[int]] = [[5, 0], [0, 3], [1, 7], [0, 0]]  # tokens by lane
    seeded = torch.Generator().manual_seed(1)
    tokens = [[torch.randn(count, hidden, generator=seeded) for count in lanes] for lanes in given]

    def one(communicator: Any, rank: int) -> list[Tensor | None]:
        mesh = Mesh(shape, rank, communicator)
        model, found = built(tmp_path, cpu, mesh), list[Tensor | None]()
        for lanes in tokens:
            x = lanes[shape.coordinates(rank)["dp"]]
            for layer in model.expert_layers:
                found.append(layer(x, None) if len(x) else layer.join())
        return found

    for rank, results in enumerate(on_ranks(shape.size, one)):
        inputs = [lanes[shape.coordinates(rank)["dp"]] for lanes in tokens]
        wanted = [layer(x, None) if len(x) else None for x in inputs for layer in alone.expert_layers]
        for result, expected in zip(results, wanted, strict=True):
            if expected is None:
                assert result is None
            else:
                assert result is not None
                torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


# -- sizes ----------------------------------------------------------------------------------------------------


def test_ranks_of_a_lane_are_neighbours_and_one_of_each_lane_reports() -> None:
    config = EngineConfig(data_parallel_size=2, tensor_parallel_size=2)
    first = WorkerSpec(
        config=config, device="cpu", device_indexes=(0,), rank=0, world_size=4, store="", folder="", probe={}
    )
    specs = [msgspec.structs.replace(first, rank=rank) for rank in range(4)]
    assert [spec.lane for spec in specs] == [0, 0, 1, 1]
    assert [spec.reports for spec in specs] == [True, False, True, False]


def test_experts_lie_over_the_ranks_of_all_lanes_and_attention_over_those_of_one(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint("qwen3-moe", tmp_path)
    sizes: dict[str, dict[str, Any]] = {
        "one": {},
        "dp2": {"data_parallel_size": 2},
        "dp2 ep2": {"data_parallel_size": 2, "expert_parallel": True},
        "tp2 ep2": {"tensor_parallel_size": 2, "expert_parallel": True},
        "dp2 tp2 ep4": {"data_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel": True},
    }
    plans = {
        name: plan_engine(EngineConfig(model=str(tmp_path), device="cpu", dtype="float32", **given))
        for name, given in sizes.items()
    }
    weights = {name: plan.worker.memory.weights for name, plan in plans.items()}
    assert weights["one"] == weights["dp2"]
    assert weights["dp2 tp2 ep4"] < weights["tp2 ep2"] < weights["dp2 ep2"] < weights["one"]
    assert [plan.num_devices for plan in plans.values()] == [1, 2, 2, 2, 4]
    asked = ["--data-parallel-size", "2", "--tensor-parallel-size", "2", "--expert-parallel", "--skip-tokenizer"]
    assert main(["plan", str(tmp_path), "--device", "cpu", *asked]) == 0
    printed = capsys.readouterr().out
    assert "2 lanes of 2 of 4 devices" in printed and "tokens at once, in each lane" in printed
    assert (
        "experts lie over 4 ranks of 2 lanes; in each of their layers a token sends 256 B to the rank of each"
        in printed
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data_parallel_size": 0}, "data_parallel_size is 0; expected 1 or more"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size with data_parallel_size 2: .* or run replicas"),
        ({"context_parallel_size": 2}, "context_parallel_size with data_parallel_size 2: .* or run replicas"),
        ({"speculate": "ngram"}, "speculate with data_parallel_size 2"),
        ({"executor": "inline"}, "executor inline drives one worker, and data_parallel_size 2 are several"),
        ({"nodes": ("a", "b", "c"), "cluster_key": "k"}, "data_parallel_size 2 makes 2 ranks, which 3 nodes cannot"),
    ],
)
def test_lanes_that_no_engine_can_have_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig(**{"data_parallel_size": 2, **settings})


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("llama", {"expert_parallel": True}, "LlamaForCausalLM: expert_parallel: it has no experts"),
        ("llama", {"data_parallel_size": 999}, "data_parallel_size 999 needs as many cpu devices, .* are there"),
        ("llama", {"device": "fake-spmd"}, "drives its 4 devices from one process; leave data_parallel_size at 1"),
        (
            "qwen3-moe",
            {"data_parallel_size": 3, "expert_parallel": True},
            "experts of .* do not split evenly over 3 ranks; 1, 2, 4, 8 would",
        ),
        (
            "qwen3-moe",
            {"expert_parallel": True, "model_impl": "transformers"},
            "experts over the ranks of several lanes",
        ),
    ],
)
def test_lanes_that_do_not_fit_model_or_device_are_refused_by_name(
    tmp_path: Any, family: str, settings: dict[str, Any], said: str
) -> None:
    make_checkpoint(family, tmp_path)
    given = {"model": str(tmp_path), "device": "cpu", "data_parallel_size": 2, "num_kv_blocks": 64, **settings}
    with pytest.raises((ConfigError, Unsupported, DeviceUnavailable), match=said):
        plan_engine(EngineConfig(**given))


# -- the tokens of one process --------------------------------------------------------------------------------

SIZES: dict[str, dict[str, Any]] = {
    "dp2": {"data_parallel_size": 2},
    "dp2-ep2": {"data_parallel_size": 2, "expert_parallel": True},
    "dp2-tp2": {"data_parallel_size": 2, "tensor_parallel_size": 2},
    "dp2-tp2-ep4": {"data_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel": True},
    "dp2-ep2-moving": {
        "data_parallel_size": 2,
        "expert_parallel": True,
        "eplb_interval": 4,
        "num_redundant_experts": 2,
    },
}
DENSE = ("llama", "gemma3", "falcon-h1")
"""Of every kind of cache: one group, windows, states."""
MIXTURES = ("qwen3-moe", "deepseek-v3", "gpt-oss")
"""Attention with heads, latent attention behind a dense layer with a shared expert, stacked experts."""


class Way(NamedTuple):
    """Of running a model over lanes."""

    family: str
    sizes: str
    budget: int
    prefix_caching: bool
    preemption: bool
    overlap: bool


def ways() -> list[Way]:
    flags = (True, False)
    dense = product(DENSE, ("dp2", "dp2-tp2"), (7, 64), flags, flags, flags)
    mixed = product(MIXTURES, SIZES, (7, 64), flags, flags, flags)
    return [Way(*values) for values in (*dense, *mixed)]


def covering() -> list[Way]:
    """Every pair of two settings' values stands together in some case, but that of families and sizes: the full product
    has the others."""

    def pairs(way: Way) -> set[tuple[int, object, int, object]]:
        few = way._replace(family="mixture" if way.family in MIXTURES else "dense")
        return {(i, few[i], j, few[j]) for i, j in combinations(range(len(way)), 2)} | {(0, way.family, 0, "")}

    return cover(ways(), pairs)


def check(way: Way, oracles: Oracles, **more: Any) -> None:
    checkpoint, answers = oracles.get(way.family)
    case = Case(way.family, way.budget, way.prefix_caching, way.preemption, way.overlap, "cpu")
    with open_llm(case, Path(checkpoint), executor="multiprocess", **SIZES[way.sizes], **more) as llm:
        as_expected(answers, llm)
        scheduler = llm.engine.scheduler
        assert not way.preemption or scheduler.num_preemptions > 0
        for lane in scheduler.lanes:
            assert lane.stats.prefix_queries > 0, "every lane was to have requests"
            assert lane.kv.pool.num_free == lane.kv.pool.num_usable
        if "moving" in way.sizes:
            assert scheduler.stats.experts.moved > 0, "the case was to move experts"


@pytest.mark.parametrize("way", covering(), ids=lambda way: "-".join(map(str, way)))
def test_greedy_tokens_over_lanes_equal_transformers(way: Way, oracles: Oracles, threads: None) -> None:
    check(way, oracles)


@pytest.mark.full
@pytest.mark.parametrize("way", ways(), ids=lambda way: "-".join(map(str, way)))
def test_greedy_tokens_over_lanes_equal_transformers_in_the_full_product(
    way: Way, oracles: Oracles, threads: None
) -> None:
    check(way, oracles)


@pytest.mark.full
@pytest.mark.parametrize(("family", "sizes"), [("llama", "dp2"), ("qwen3-moe", "dp2-ep2"), ("gpt-oss", "dp2-tp2-ep4")])
def test_greedy_tokens_of_processes_equal_transformers(family: str, sizes: str, oracles: Oracles) -> None:
    check(Way(family, sizes, 64, True, True, True), oracles)


@pytest.mark.full
@pytest.mark.parametrize(("family", "sizes"), [("llama", "dp2-tp2"), ("qwen3-moe", "dp2-tp2-ep4")])
def test_greedy_tokens_with_sums_by_gloo_equal_transformers(
    family: str, sizes: str, oracles: Oracles, threads: None
) -> None:
    """Without the compiled kernels, sums over a lane's ranks do not go through shared memory."""
    check(Way(family, sizes, 64, True, True, True), oracles, device_options={"isa": "reference"})


# -- whatever a request asks for, and lanes without requests --------------------------------------------------

MEETING: dict[str, Any] = {"device": "cpu", "executor": "multiprocess", **SIZES["dp2-ep2"]}


@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.full)])
def test_whatever_requests_ask_for_is_as_with_one_lane(oracles: Oracles, threads: None, overlap: bool) -> None:
    folder, _ = oracles.get("qwen3-moe")
    given = {
        "skip_tokenizer": True, "dtype": "float32", "num_kv_blocks": 96, "max_model_len": 96, "max_num_seqs": 16,
        "pooling": True, "overlap": overlap,
    }  # fmt: skip
    with LLM(str(folder), device="cpu", **given) as one, LLM(str(folder), **MEETING, **given) as two:
        expected, found = answers(one), answers(two)
        assert all(lane.stats.prefix_queries > 0 for lane in two.engine.scheduler.lanes)
    assert found[0] == expected[0]
    assert len(found[1]) > 100 and found[1] == pytest.approx(expected[1], abs=1e-5)


def test_adapters_are_in_every_lane(tmp_path: Path, threads: None) -> None:
    base = Base("llama", tmp_path, dict(zip(NAMES, FIVE[:2], strict=False)))
    with base.opened(device="cpu", executor="multiprocess", data_parallel_size=2) as llm:
        for name, expected in base.expected.items():
            assert drawn(llm, name) == expected, name


def check_idle(folder: Path, num_tokens: int, sizes: str) -> None:
    """One request at a time, of `num_tokens` in all, so that all but one lane have nothing to do; what they are told is
    counted by the steps that they meet in."""
    given = {"skip_tokenizer": True, "dtype": "float32", "num_kv_blocks": 64, "max_model_len": 512, "max_num_seqs": 4}
    settings = {"device": "cpu", "executor": "multiprocess", "step_timeout_s": 60.0, **SIZES[sizes]}
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=min(400, num_tokens - done), ignore_eos=True)
        for done in range(0, num_tokens, 400)
    ]
    with LLM(str(folder), device="cpu", **given) as one:
        expected = [one.generate([[5, 6, 7]], each)[0].outputs[0].token_ids for each in sampling]
    with LLM(str(folder), **given, **settings) as llm:
        found = [llm.generate([[5, 6, 7]], each)[0].outputs[0].token_ids for each in sampling]
        stats = llm.engine.scheduler.stats
        assert stats.steps >= num_tokens
        assert [lane.stats.prefix_queries > 0 for lane in llm.engine.scheduler.lanes] == [True, False]
        late = llm.generate([[9] * 4, [8] * 5], sampling[-1])  # both lanes work again
        assert all(len(output.outputs[0].token_ids) == sampling[-1].max_tokens for output in late)
        assert all(lane.stats.prefix_queries > 0 for lane in llm.engine.scheduler.lanes)
    assert found == expected


@pytest.mark.parametrize("sizes", ["dp2", "dp2-ep2"])
def test_lanes_without_requests_keep_nobody_waiting(oracles: Oracles, threads: None, sizes: str) -> None:
    check_idle(oracles.get("qwen3-moe")[0], 60, sizes)


@pytest.mark.full
@pytest.mark.parametrize("sizes", ["dp2", "dp2-ep2", "dp2-ep2-moving", "dp2-tp2-ep4"])
def test_a_lane_of_processes_without_requests_keeps_nobody_waiting_for_a_thousand_steps(
    oracles: Oracles, sizes: str
) -> None:
    check_idle(oracles.get("qwen3-moe")[0], 1000, sizes)


# -- what is seen of it ---------------------------------------------------------------------------------------


def test_metrics_show_how_each_lane_stands() -> None:
    metrics = Metrics("m")
    lanes = (LaneStats(3, 0, 5, 20), LaneStats(1, 2, 1, 20))
    metrics.take(EngineStats(4, 2, 9, 6, 40, 5, 0, 0, 0, lanes=lanes))
    text = metrics.render().decode()
    assert 'anychip_lane_kv_cache_usage_ratio{lane="0",model_name="m"} 0.25' in text
    assert 'anychip_lane_num_requests_running{lane="1",model_name="m"} 1.0' in text
    assert 'anychip_kv_cache_usage_ratio{model_name="m"} 0.15' in text
    metrics.engine_ended()
    assert 'lane="' not in metrics.render().decode()
