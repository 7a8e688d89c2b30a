"""Stages of a pipeline give the tokens of one rank, whatever families, groups of layers and ways to schedule meet."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import pytest
from judged import Oracles, check_engine
from safetensors.torch import load_file
from test_adapters import NAMES, Base, drawn
from test_plan import config_folder

from anychip import LLM, EngineConfig, SamplingParams
from anychip.entrypoints.cli.main import main
from anychip.errors import ConfigError, DeviceFault, DeviceUnavailable, Unsupported
from anychip.launch.plan import plan_engine
from anychip.model_config import load_model_config
from anychip.plugin_api import Communicator, GroupSpec, Mesh, MeshShape
from anychip.worker.absent_ranks import AbsentRanks
from anychip.worker.model_source import CheckpointSource
from anychip.worker.open_platform import explained
from anychip.worker.stages import StageCosts, balanced
from anychip_conformance.device import open_device
from anychip_conformance.equality.tiny_adapters import FIVE
from anychip_conformance.equality.tiny_models import FAMILIES
from anychip_conformance.equality.workload import Case, cover
from anychip_cpu.platform import CpuPlatform


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
WITH_EXPERTS = ("qwen3-moe", "deepseek-v2")


def ways(families: tuple[str, ...]) -> list[Way]:
    flags = (True, False)
    return [Way(*values) for values in product(families, LAYERS, (7, 64), flags, flags, flags)]


ON_ONE_STAGE = "zamba2"
"""Every shared block reads the embeddings, which the first stage holds; more stages are refused by that name."""


def covering() -> list[Way]:
    """Every pair of two settings' values stands together in some case, but that of families with experts, and of those
    without, one meets each way to cut it into stages: the full product has the others."""

    def pairs(way: Way) -> set[tuple[int, object, int, object]]:
        places = [place for place in combinations(range(len(way)), 2) if place != (0, 1)]
        kind = "with experts" if way.family in WITH_EXPERTS else "without"
        return {(i, way[i], j, way[j]) for i, j in places} | {(0, kind, 1, way.layers)}

    return cover(ways(FEW), pairs)


def full_product() -> list[Way]:
    """The product of the few families, and of every family each way to cut it."""
    others = tuple(family for family in FAMILIES if family not in (*FEW, ON_ONE_STAGE))
    once = [Way(family, layers, 64, True, True, True) for family, layers in product(others, LAYERS)]
    return [*ways(FEW), *once]


def check(way: Way, oracles: Oracles) -> None:
    case = Case(way.family, way.budget, way.prefix_caching, way.preemption, way.overlap, "cpu")
    check_engine(case, oracles, **way.settings)


@pytest.mark.parametrize("way", covering(), ids=lambda way: "-".join(map(str, way)))
def test_greedy_tokens_over_stages_equal_transformers(way: Way, oracles: Oracles, threads: None) -> None:
    check(way, oracles)


@pytest.mark.full
@pytest.mark.parametrize("layers", ["3+1", "1+2+1", "2+2x2"])
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_greedy_tokens_of_processes_equal_transformers(family: str, layers: str, oracles: Oracles) -> None:
    check(Way(family, layers, 64, True, True, True), oracles)


@pytest.mark.full
@pytest.mark.parametrize("way", full_product(), ids=lambda way: "-".join(map(str, way)))
def test_greedy_tokens_over_stages_equal_transformers_in_the_full_product(
    way: Way, oracles: Oracles, threads: None
) -> None:
    check(way, oracles)


# -- whatever a request asks for ------------------------------------------------------------------------------

STAGES: dict[str, object] = {"device": "cpu", "executor": "multiprocess", "pipeline_parallel_size": 2}
ASKED = (
    SamplingParams(temperature=0.9, seed=7, max_tokens=9, ignore_eos=True, logprobs=3),
    SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, prompt_logprobs=2),
    SamplingParams(temperature=1.2, top_k=40, top_p=0.9, seed=3, n=2, max_tokens=7, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, repetition_penalty=1.4, frequency_penalty=0.4),
    SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, allowed_token_ids=(5, 9, 11, 40)),
    SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, logit_bias={17: 4.0}),
    SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, beam_width=3),
)


def answers(llm: LLM) -> tuple[list[object], list[object]]:
    """Of every way to ask, at once, and of vectors: tokens, and numbers."""
    prompts = [[3 + (at * 37 + length) % 90 for at in range(length)] for length in (1, 20, 9, 33, 5, 17, 12)]
    tokens, numbers = list[object](), list[object]()
    for output in llm.generate(prompts, ASKED):
        tokens.append([one.token_ids for one in output.outputs])
        numbers += [entry.chosen for one in output.outputs for entry in one.logprobs or ()]
        numbers += [entry.chosen for entry in output.prompt_logprobs or () if entry is not None]
    for vector in llm.embed(prompts):
        numbers += vector.tolist()
    return tokens, numbers


@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.full)])
def test_whatever_requests_ask_for_is_as_with_one_stage(oracles: Oracles, threads: None, overlap: bool) -> None:
    folder, _ = oracles.get("llama")
    given = {
        "skip_tokenizer": True, "dtype": "float32", "num_kv_blocks": 96, "max_model_len": 96, "max_num_seqs": 16,
        "pooling": True, "overlap": overlap,
    }  # fmt: skip
    with LLM(str(folder), device="cpu", **given) as one, LLM(str(folder), **STAGES, **given) as two:
        expected, found = answers(one), answers(two)
    assert found[0] == expected[0]
    assert len(found[1]) > 100 and found[1] == pytest.approx(expected[1], abs=1e-5)


def test_adapters_are_cut_as_the_layers_are(tmp_path: Path, threads: None) -> None:
    base = Base("llama", tmp_path, dict(zip(NAMES, FIVE[:2], strict=False)))
    with base.opened(**STAGES) as llm:
        for name, expected in base.expected.items():
            assert drawn(llm, name) == expected, name


# -- what a stage holds ---------------------------------------------------------------------------------------


def source_of(folder: Path, rank: int, **settings: object) -> CheckpointSource:
    device = open_device("cpu", {})
    config = EngineConfig(model=str(folder), device="cpu", dtype="float32", pipeline_parallel_size=2, **settings)
    source = CheckpointSource(
        config=config, model=load_model_config(str(folder)), platform=device.platform, ops=device.ops, contributed={}
    )
    source.take_stage(MeshShape(pp=2), rank)
    return source


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_stage_reads_what_it_holds_and_nothing_else(family: str, oracles: Oracles) -> None:
    """Of gemma2 the embedding is the head, which both stages hold."""
    folder, _ = oracles.get(family)
    whole = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    read = []
    for rank in range(2):
        source = source_of(folder, rank, pipeline_layers=(1, 3))
        source.build(Mesh(MeshShape(pp=2), rank, AbsentRanks))
        assert source.progress.nbytes <= source.held_bytes
        read.append(source.progress.nbytes)
    tied = load_model_config(str(folder)).tie_word_embeddings
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].nbytes
    assert sum(read) == whole + (table if tied else 0)


def test_a_plan_says_what_each_stage_holds_and_sends(
    tmp_path: Path, threads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = config_folder("llama", tmp_path)
    settings = {
        "device": "cpu", "load_format": "dummy", "kv_cache_bytes": 32 << 20, "max_model_len": 256,
        "pipeline_parallel_size": 2,
    }  # fmt: skip
    plan = plan_engine(EngineConfig(model=model, **settings))
    with LLM(model, skip_tokenizer=True, executor="multiprocess", **settings) as llm:
        assert llm.worker.memory.weights == plan.worker.memory.weights
        assert llm.worker.kv.num_blocks == plan.worker.kv.num_blocks
    assert plan.num_devices == 2
    assert main(["plan", model, "--device", "cpu", "--load-format", "dummy", "--pipeline-parallel-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert "stage 1 of 2 holds layers 0 to 6 of 12, the embedding; a step sends 1024 B a token to stage 2" in printed
    assert "the final norm and the head; a step sends 4 B a drawn token to stage 1" in printed
    assert printed.count("of the largest step") == 2


# -- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pipeline_parallel_size": 5}, "is 5, and the model has 4 layers; give 4 or less"),
        ({"pipeline_layers": (2, 3)}, "pipeline_layers 2,3 are 5 layers, and the model has 4"),
        ({"tensor_parallel_size": 3}, "4 attention heads do not split evenly over 3 ranks; 1, 2, 4 would"),
        ({"model_impl": "transformers"}, "native decoders alone are cut into stages"),
        ({"device": "fake-spmd"}, "drives its 4 devices from one process; leave pipeline_parallel_size at 1"),
        ({"pipeline_parallel_size": 99}, "pipeline_parallel_size 99 needs as many cpu devices"),
    ],
)
def test_what_cannot_be_cut_so_is_refused_with_what_can(
    oracles: Oracles, settings: dict[str, object], said: str
) -> None:
    folder, _ = oracles.get("llama")
    given = {"device": "cpu", "pipeline_parallel_size": 2, "num_kv_blocks": 64, **settings}
    with pytest.raises((ConfigError, Unsupported, DeviceUnavailable), match=said):
        plan_engine(EngineConfig(model=str(folder), **given))


def test_a_device_without_the_axis_says_so(oracles: Oracles, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: CpuPlatform, group: GroupSpec) -> Communicator:
        raise Unsupported(self.name, ["no links between devices"])

    monkeypatch.setattr(CpuPlatform, "communicator", refuse)
    folder, _ = oracles.get("llama")
    with pytest.raises(Unsupported, match="axis pp of 2 ranks: no links between devices"):
        LLM(str(folder), skip_tokenizer=True, num_kv_blocks=64, **STAGES)


@pytest.mark.parametrize(("others_wait", "fatal"), [(False, False), (True, True)])
def test_a_fault_of_one_stage_is_fatal_since_the_others_wait_for_its_step(others_wait: bool, fatal: bool) -> None:
    platform = open_device("cpu", {}).platform
    with pytest.raises(DeviceFault) as fault, explained(platform, others_wait=others_wait):
        raise DeviceFault("asked 2 GiB", kind="out_of_memory", fatal=False)
    assert (fault.value.fatal, fault.value.kind) == (fatal, "out_of_memory")


def test_stages_balance_what_their_steps_read() -> None:
    """The head counts as layers do, and the embedding, of which a step reads few rows, only between equals."""
    costs = StageCosts(layers=[10] * 22, embedding=50, head=50, tied=False)
    assert [balanced(costs, count) for count in (1, 2, 3, 22)] == [(22,), (13, 9), (9, 9, 4), (1,) * 22]
    uneven = StageCosts(layers=[50, 10, 10, 10, 10, 10], embedding=0, head=0, tied=False)
    assert balanced(uneven, 2) == (1, 5)
    equals = StageCosts(layers=[10, 10, 10], embedding=30, head=0, tied=False)
    assert balanced(equals, 2) == (1, 2)
