"""Ranks that share the keys of every sequence give one rank's tokens, whatever layers and ways to schedule meet."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from judged import Oracles, as_expected, check_engine
from ranks_in_threads import on_ranks
from test_pipeline import answers
from test_plan import config_folder
from torch import Tensor

from anychip import LLM, EngineConfig, SamplingParams
from anychip.entrypoints.cli.main import main
from anychip.errors import ConfigError, DeviceUnavailable, KVCacheTooSmall, Unsupported
from anychip.launch.plan import plan_engine
from anychip.layers.context_parallel import ContextAttention, ContextShare
from anychip.ops.reference import ReferenceAttention
from anychip.plugin_api import (
    PADDING_SLOT,
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    BatchView,
    Communicator,
    GroupSpec,
    Mesh,
    MeshShape,
    PlatformContext,
    ShapeKey,
)
from anychip_conformance.equality.tiny_models import FAMILIES, THROUGH_TRANSFORMERS, make_checkpoint
from anychip_conformance.equality.workload import Case, cover, open_llm
from anychip_cpu.platform import CpuPlatform


class Way(NamedTuple):
    """Of running a model over contexts."""

    family: str
    ranks: str  # contexts, and behind an x the ranks that share layers, or behind a + the stages
    budget: int
    prefix_caching: bool
    preemption: bool
    overlap: bool

    @property
    def settings(self) -> dict[str, object]:
        contexts, _, tp = self.ranks.partition("x")
        contexts, _, pp = contexts.partition("+")
        return {
            "device": "cpu",
            "executor": "multiprocess",
            "context_parallel_size": int(contexts),
            "tensor_parallel_size": int(tp or 1),
            "pipeline_parallel_size": int(pp or 1),
        }


RANKS = ("2", "3", "2x2", "2+2")
FEW = ("llama", "qwen3-moe", "gemma3", "gpt-oss", "falcon-h1")
"""Dense, with experts, with windows, with sinks, with states."""
NONE_TO_SHARE = ("deepseek-v2", "deepseek-v3", "deepseek-v32", "glm-5", "mamba", "mamba2", "mistral")
"""Latent rows; states or windows alone."""


def ways(families: tuple[str, ...]) -> list[Way]:
    flags = (True, False)
    return [Way(*values) for values in product(families, RANKS, (7, 64), flags, flags, flags)]


def covering() -> list[Way]:
    """Every pair of two settings' values stands together in some case, but that a family need not meet every number of
    ranks: the full product has those."""

    def pairs(way: Way) -> set[tuple[int, object, int, object]]:
        return {(i, way[i], j, way[j]) for i, j in combinations(range(len(way)), 2) if (i, j) != (0, 1)}

    return cover(ways(FEW), pairs)


def full_product() -> list[Way]:
    """The product of the few families, and of every other family that has keys to share each number of ranks."""
    there = (*FAMILIES, *THROUGH_TRANSFORMERS)
    others = tuple(family for family in there if family not in (*FEW, *NONE_TO_SHARE))
    once = [
        Way(family, ranks, 64, True, True, True)
        for family, ranks in product(others, RANKS)
        if family not in THROUGH_TRANSFORMERS or ranks in ("2", "3")  # they are not cut into stages, nor all over tp
    ]
    return [*ways(FEW), *once]


def check(way: Way, oracles: Oracles) -> None:
    case = Case(way.family, way.budget, way.prefix_caching, way.preemption, way.overlap, "cpu")
    check_engine(case, oracles, **way.settings)


@pytest.mark.parametrize("way", covering(), ids=lambda way: "-".join(map(str, way)))
def test_greedy_tokens_over_contexts_equal_transformers(way: Way, oracles: Oracles, threads: None) -> None:
    check(way, oracles)


@pytest.mark.full
@pytest.mark.parametrize("ranks", ["2", "2x2"])
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_greedy_tokens_of_processes_equal_transformers(family: str, ranks: str, oracles: Oracles) -> None:
    check(Way(family, ranks, 64, True, True, True), oracles)


@pytest.mark.full
@pytest.mark.parametrize("way", full_product(), ids=lambda way: "-".join(map(str, way)))
def test_greedy_tokens_over_contexts_equal_transformers_in_the_full_product(
    way: Way, oracles: Oracles, threads: None
) -> None:
    check(way, oracles)


@pytest.mark.full
@pytest.mark.parametrize("moving", [False, True])
def test_experts_over_ranks_serve_beside_contexts(oracles: Oracles, threads: None, moving: bool) -> None:
    checkpoint, expected = oracles.get("qwen3-moe")
    settings = Way("qwen3-moe", "2x2", 64, True, True, True).settings | {"expert_parallel": True}
    settings |= {"eplb_interval": 4, "num_redundant_experts": 2} if moving else {}
    with open_llm(Case("qwen3-moe", 64, True, True, True, "cpu"), Path(checkpoint), **settings) as llm:
        as_expected(expected, llm)


# -- whatever a request asks for ------------------------------------------------------------------------------

CONTEXTS: dict[str, object] = {"device": "cpu", "executor": "multiprocess", "context_parallel_size": 2}


@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.full)])
def test_whatever_requests_ask_for_is_as_with_one_context(oracles: Oracles, threads: None, overlap: bool) -> None:
    """Forks and beams copy blocks, of which each rank has a part."""
    folder, _ = oracles.get("llama")
    given = {
        "skip_tokenizer": True, "dtype": "float32", "num_kv_blocks": 96, "max_model_len": 96, "max_num_seqs": 16,
        "pooling": True, "overlap": overlap,
    }  # fmt: skip
    with LLM(str(folder), device="cpu", **given) as one, LLM(str(folder), **CONTEXTS, **given) as two:
        expected, found = answers(one), answers(two)
    assert found[0] == expected[0]
    assert len(found[1]) > 100 and found[1] == pytest.approx(expected[1], abs=1e-5)


def test_drafts_are_judged_over_contexts_as_over_one(oracles: Oracles, threads: None) -> None:
    folder, _ = oracles.get("llama")
    given = {"skip_tokenizer": True, "dtype": "float32", "num_kv_blocks": 64, "max_model_len": 128}
    asked = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    prompts = [[5, 9, 11, 40] * 9, [7, 8] * 20]
    with LLM(str(folder), device="cpu", **given) as one:
        expected = [output.outputs[0].token_ids for output in one.generate(prompts, asked)]
    with LLM(str(folder), speculate="ngram", **CONTEXTS, **given) as two:
        assert [output.outputs[0].token_ids for output in two.generate(prompts, asked)] == expected


# -- where a key lies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "block_size"), [(2, 4), (3, 2), (4, 1)])
def test_a_key_lies_on_one_rank_and_blocks_go_round(size: int, block_size: int) -> None:
    shares = [ContextShare(size=size, rank=rank, block_size=block_size) for rank in range(size)]
    ids = [7, 3, 5, 8]  # of a sequence's blocks in the pool
    positions = torch.arange(len(ids) * shares[0].span)
    slots = torch.tensor(ids)[positions // shares[0].span] * shares[0].span + positions % shares[0].span
    held = torch.stack([share.slots(slots) for share in shares])
    assert ((held != PADDING_SLOT).sum(dim=0) == 1).all()
    for position in positions.tolist():
        rank = position // block_size % size
        assert held[rank, position] // block_size == ids[position // (block_size * size)]
        assert held[rank, position] % block_size == position % block_size
        before = [int((held[rank, :position] != PADDING_SLOT).sum()) for rank in range(size)]
        assert [int(share.num_held(torch.tensor(position))) for share in shares] == before
    assert all(int(share.slots(torch.tensor([PADDING_SLOT]))) == PADDING_SLOT for share in shares)


BLOCK, SPAN = 16, 32
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32", kv_dtype="float32", lse=True)


def batch(rows: list[tuple[int, int]], *, padded: tuple[int, int] = (0, 0), block_size: int = SPAN) -> BatchView:
    """Rows (new tokens, keys with them), each with four blocks of its own, behind them some padded tokens and rows."""
    more_tokens, more_rows = padded
    news, lengths = ([row[place] for row in rows] for place in (0, 1))
    total = sum(news)
    positions = [at for new, length in rows for at in range(length - new, length)]
    owners = [row for row, new in enumerate(news) for _ in range(new)]
    table = torch.arange(1, 1 + (len(rows) + more_rows) * 4, dtype=torch.int32).view(-1, 4)
    slots = [
        int(table[row, at // block_size]) * block_size + at % block_size
        for row, at in zip(owners, positions, strict=True)
    ]
    starts = [0, *np.cumsum(news).tolist()]
    return BatchView(
        query_start=torch.tensor(starts + [total] * more_rows, dtype=torch.int32),
        seq_lens=torch.tensor(lengths + [0] * more_rows, dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.tensor(slots + [PADDING_SLOT] * more_tokens),
        positions=torch.tensor(positions + [0] * more_tokens, dtype=torch.int32),
        num_reqs=len(rows) + more_rows,
        num_tokens=total + more_tokens,
        max_query_len=max(news),
        block_size=block_size,
        host_query_lens=np.array(news, dtype=np.int32),
        host_seq_lens=np.array(lengths, dtype=np.int32),
        host_exact=True,
        host_slot_mapping=np.array(slots, dtype=np.int64),
    )


STEPS = {
    "a prompt, a chunk, a row that decodes and one without tokens": ([(40, 40), (9, 70), (1, 33), (0, 0)], (5, 2)),
    "rows that decode": ([(1, 1), (1, 16), (1, 17), (1, 64), (1, 65)], (0, 0)),
    "rows that decode, and padding": ([(1, 40), (1, 7)], (2, 2)),
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("step", STEPS)
def test_every_query_is_a_row_over_the_keys_that_its_rank_holds(step: str, size: int) -> None:
    rows, padded = STEPS[step]
    whole = batch(rows, padded=padded, block_size=BLOCK * size)
    total = sum(new for new, _ in rows)
    for rank in range(size):
        share = ContextShare(size=size, rank=rank, block_size=BLOCK)
        mine = share.view(whole)
        visible = [at + 1 for new, length in rows for at in range(length - new, length)]
        held = [sum(key // BLOCK % size == rank for key in range(count)) for count in visible]
        assert mine.seq_lens.tolist() == held + [0] * padded[0]
        assert mine.query_start.tolist() == [*range(total + 1), *[total] * padded[0]]
        owners = [row for row, (new, _) in enumerate(rows) for _ in range(new)]
        for token, (row, length) in enumerate(zip(owners, held, strict=True)):
            pages = -(-length // BLOCK)
            assert mine.block_table[token, :pages].tolist() == whole.block_table[row, :pages].tolist()
        assert mine.host_seq_lens is not None and mine.host_slot_mapping is not None
        assert mine.host_seq_lens.tolist() == held and mine.host_query_lens.tolist() == [1] * total
        assert mine.host_slot_mapping.tolist() == mine.slot_mapping[:total].tolist()
        assert (mine.num_reqs, mine.num_tokens, mine.block_size) == (whole.num_tokens, whole.num_tokens, BLOCK)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_parts_of_all_ranks_are_attention_over_all_keys(step: str, with_sinks: bool) -> None:
    """Over pages that hold what earlier steps wrote, with keys and values of this step on the way."""
    rows, padded = STEPS[step]
    drawn = torch.Generator().manual_seed(3)
    spec = replace(SPEC, sinks=with_sinks)
    sinks = torch.randn(4, generator=drawn) if with_sinks else None
    layer = AttentionLayer(index=0, scale=0.3, ops=SimpleNamespace(), sinks=sinks)
    steps = batch([(length - new, length - new) for new, length in rows]), batch(rows, padded=padded)
    num_blocks = 1 + int(steps[1].block_table.max())
    inputs = [[torch.randn(each.num_tokens, heads, 8, generator=drawn) for heads in (4, 2, 2)] for each in steps]

    def run(backend: AttentionBackend) -> Tensor:
        raw = torch.zeros(num_blocks * backend.kv_layout().page_bytes(SPAN), dtype=torch.uint8)
        cache, found = backend.make_cache(raw, num_blocks, SPAN), torch.empty(0)
        for each, (q, k, v) in zip(steps, inputs, strict=True):
            shape = ShapeKey(
                num_tokens=each.num_tokens,
                num_reqs=each.num_reqs,
                num_samples=1,
                max_query_len=each.max_query_len,
                num_pages=4,
            )
            found, cache = backend.forward(q, k, v, cache, backend.plan(each, shape, group=0), layer)
        return found

    def over_contexts(communicator: Callable[[GroupSpec], Communicator], rank: int) -> Tensor:
        return run(ContextAttention(ReferenceAttention(spec), Mesh(MeshShape(cp=2), rank, communicator).axis("cp")))

    expected, found = run(ReferenceAttention(spec)), on_ranks(2, over_contexts)
    total = sum(new for new, _ in rows)
    torch.testing.assert_close(found[0][:total], expected[:total])
    assert torch.equal(found[0], found[1]), "ranks go on with the same bits"


# -- what fits ------------------------------------------------------------------------------------------------


def test_two_contexts_serve_twice_the_tokens_in_the_same_memory(oracles: Oracles, threads: None) -> None:
    """A request that is longer than what one rank's memory holds gets the tokens of an engine with more of it."""
    folder, _ = oracles.get("llama")
    given = {"skip_tokenizer": True, "dtype": "float32", "max_model_len": 128, "device": "cpu"}
    few: dict[str, object] = {"num_kv_blocks": 5, "block_size": 16}  # four of them are a request's: 64 tokens
    asked = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    prompt = [3 + at * 37 % 90 for at in range(100)]
    with pytest.raises(KVCacheTooSmall, match="lower --max-model-len to 64"):
        plan_engine(EngineConfig(model=str(folder), **{**given, **few}))  # type: ignore[arg-type]
    with LLM(str(folder), num_kv_blocks=64, **given) as one:
        expected = one.generate([prompt], asked)[0].outputs[0].token_ids
    with LLM(str(folder), **{**given, **CONTEXTS, **few}) as two:
        assert two.generate([prompt], asked)[0].outputs[0].token_ids == expected
        assert two.worker.memory.kv_tokens == 128


def test_a_plan_says_what_each_context_keeps_and_receives(
    tmp_path: Path, threads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = config_folder("llama", tmp_path)
    settings: dict[str, object] = {"device": "cpu", "load_format": "dummy", "kv_cache_bytes": 8 << 20}
    one = plan_engine(EngineConfig(model=model, **settings))  # type: ignore[arg-type]
    plan = plan_engine(EngineConfig(model=model, context_parallel_size=2, **settings))  # type: ignore[arg-type]
    assert plan.num_devices == 2
    assert plan.worker.memory.weights == one.worker.memory.weights
    assert plan.worker.memory.kv_token * 2 == one.worker.memory.kv_token
    assert plan.longest == 2 * one.longest
    with LLM(model, skip_tokenizer=True, executor="multiprocess", context_parallel_size=2, **settings) as llm:
        assert llm.worker.memory.kv_cache == plan.worker.memory.kv_cache
        assert llm.worker.kv == plan.worker.kv
    given = ["--device", "cpu", "--load-format", "dummy", "--kv-cache-bytes", str(8 << 20)]
    assert main(["plan", model, "--context-parallel-size", "2", *given]) == 0
    printed = capsys.readouterr().out
    assert "each of 2 contexts keeps one of 2 blocks of 16 tokens" in printed
    assert "a step receives 2080 B a token in each of 12 layers" in printed
    assert re.search(rf"that fits +{plan.longest} +of one request", printed)


# -- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("deepseek-v2", {}, "latent rows .MLA. are kept whole by each rank"),
        ("mamba2", {}, "no layer attends to whole contexts; windows and states are as long with one rank"),
        ("mistral", {}, "no layer attends to whole contexts"),
        ("llama", {"device": "fake-spmd"}, "drives its 4 devices from one process; leave context_parallel_size at 1"),
        ("llama", {"context_parallel_size": 99}, "context_parallel_size 99 needs as many cpu devices"),
        ("llama", {"context_parallel_size": 0}, "context_parallel_size is 0; expected 1 or more"),
        ("llama", {"block_size": 17}, "block_size 17 is not among .*: 16 is nearest"),
        ("llama", {"speculate": "draft:m"}, "draft with ngram or suffix"),
        ("llama", {"executor": "inline"}, "context_parallel_size 2 are several"),
    ],
)
def test_what_has_no_keys_to_share_or_no_ranks_is_refused_with_why(
    tmp_path: Path, family: str, settings: dict[str, object], said: str
) -> None:
    make_checkpoint(family, tmp_path)
    given = {"device": "cpu", "context_parallel_size": 2, "num_kv_blocks": 64, **settings}
    with pytest.raises((ConfigError, Unsupported, DeviceUnavailable), match=said):
        plan_engine(EngineConfig(model=str(tmp_path), **given))  # type: ignore[arg-type]


def test_a_device_whose_attention_has_no_log_sum_exp_is_refused_by_name(
    oracles: Oracles, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = oracles.get("llama")
    opened = CpuPlatform.__init__

    def without(self: CpuPlatform, context: PlatformContext) -> None:
        opened(self, context)
        self.capabilities = replace(self.capabilities, attention_lse=False)

    monkeypatch.setattr(CpuPlatform, "__init__", without)
    with pytest.raises(Unsupported, match="cpu: axis cp of 2 ranks: .*log-sum-exp.*row attention_lse"):
        plan_engine(EngineConfig(model=str(folder), device="cpu", context_parallel_size=2, num_kv_blocks=64))
