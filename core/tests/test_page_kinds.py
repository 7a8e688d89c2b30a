"""Layers of every kind through the whole engine: the toys' greedy tokens equal a plain evaluation of whole sequences,
however prompts are cut, whoever shares the batch, whatever a reused block held."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from anychip import LLM, SamplingParams
from anychip.config import EngineConfig
from anychip.errors import ConfigError, KVCacheTooSmall, Unsupported
from anychip.launch.plan import plan_engine
from anychip.ops.reference import gated_sum_chunked, gated_sum_recurrent
from anychip.plugin_api import ForwardContext, ForwardExtras
from anychip_conformance.batch import Row
from anychip_conformance.device import open_device
from anychip_conformance.equality.oracle import Answer, greedy, judge
from anychip_conformance.equality.workload import NUM_TOKENS, Case, generate, open_llm, prompts
from anychip_conformance.latent_calls import LatentCall, LatentCase
from anychip_conformance.toys import TOYS
from anychip_conformance.toys.checkpoint import make_toy

GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
BLOCKS = {"toy-every-kind": 50}
"""Of a cache that is short, where a request takes more than one block for 16 tokens."""


class Toys:
    """Checkpoints and what they answer, made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._answers: dict[str, list[Answer]] = {}

    def __getitem__(self, name: str) -> tuple[Path, list[Answer]]:
        folder = self._folder / name
        if name not in self._answers:
            oracle = make_toy(name, folder)
            self._answers[name] = [greedy(oracle, prompt, NUM_TOKENS) for prompt in prompts()]
        return folder, self._answers[name]


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def diverging(answers: list[Answer], tokens: list[list[int]]) -> list[int]:
    verdicts = [judge(answer, given) for answer, given in zip(answers, tokens, strict=True)]
    return [index for index, verdict in enumerate(verdicts) if verdict.divergence is not None and not verdict.excused]


def nothing_is_held(llm: LLM) -> None:
    kv = llm.engine.scheduler.kv
    kv.check_integrity([])
    assert kv.states is None or kv.states.num_free == kv.states.num_usable


WAYS = [(7, False, True, "cpu"), (64, True, False, "cpu"), (4096, True, True, "cpu")]


@pytest.mark.parametrize(
    ("toy", "budget", "preemption", "overlap", "device"),
    [*((toy, *way) for toy in TOYS for way in WAYS), ("toy-every-kind", 64, True, True, "cpu-tp2")],
)
def test_tokens_are_those_of_whole_sequences(toys, toy, budget, preemption, overlap, device):
    folder, answers = toys[toy]
    case = Case(toy, budget, prefix_caching=True, preemption=preemption, overlap=overlap, device=device)
    with open_llm(case, folder, **({"num_kv_blocks": BLOCKS.get(toy, 30)} if preemption else {})) as llm:
        assert not diverging(answers, list(generate(llm)))
        assert (llm.engine.scheduler.num_preemptions > 0) == preemption
        nothing_is_held(llm)


@pytest.mark.parametrize("toy", ["toy-state", "toy-latent"])
def test_a_reused_slot_starts_from_nothing(toys, toy):
    """Every block of every cache is poisoned between requests, and slots are few."""
    folder, answers = toys[toy]
    with LLM(
        str(folder),
        skip_tokenizer=True,
        device="cpu",
        dtype="float32",
        max_model_len=160,
        max_num_seqs=2,
        prefix_caching=False,
    ) as llm:
        tokens = []
        for prompt in prompts():
            for cache in llm.engine.executor.worker.runner._state.caches:
                for held in cache.values() if isinstance(cache, dict) else [cache]:
                    held.view(torch.uint8).fill_(0xFF)  # NaN
            (output,) = llm.generate([prompt], GREEDY)
            tokens.append(output.outputs[0].token_ids)
            llm.engine.drain()
        assert not diverging(answers, tokens)
        nothing_is_held(llm)


def test_sequences_of_one_request_have_states_of_their_own(toys):
    folder, _ = toys["toy-state"]
    sampling = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=8, ignore_eos=True)
    prompt = prompts()[9]
    with LLM(str(folder), skip_tokenizer=True, device="cpu", dtype="float32", max_model_len=160) as llm:
        (together,) = llm.generate([prompt], sampling)
        (again,) = llm.generate([prompt], sampling)
        nothing_is_held(llm)
    texts = [one.token_ids for one in together.outputs]
    assert len({tuple(ids) for ids in texts}) == 3
    assert texts == [one.token_ids for one in again.outputs]


def test_vectors_come_from_layers_of_every_kind(toys):
    """Whether a prompt is computed at once or in chunks, and whoever had the slot before."""
    folder, found = toys["toy-every-kind"][0], []
    for budget in (7, 4096):
        with LLM(
            str(folder),
            skip_tokenizer=True,
            device="cpu",
            dtype="float32",
            max_model_len=160,
            max_num_seqs=3,
            max_num_batched_tokens=budget,
            pooling=True,
        ) as llm:
            found.append([llm.embed(prompts(), pooling=kind) for kind in ("mean", "last", "mean")])
            nothing_is_held(llm)
    chunked, whole = (np.array(each) for each in found)
    np.testing.assert_allclose(chunked, whole, atol=2e-5)
    np.testing.assert_allclose(whole[0], whole[2], atol=2e-5)
    assert np.abs(whole[0] - whole[1]).max() > 0.01


def test_a_latent_row_turns_by_the_positions_of_its_axes():
    case = LatentCase(rows=(Row(blocks=0, extra=0, query=5),), dtype="float32", rope=True)
    with closing(open_device("cpu", {})) as device:

        def attended(axes):
            call = LatentCall.make(device, case)
            rope = replace(call.rope, axes=torch.arange(8) % 3)
            plan = call.backend.plan(call.batch.view, call.batch.key, group=0)
            extras = None if axes is None else ForwardExtras(rope_positions=axes)
            context = ForwardContext([plan], [call.cache], [0], extras=extras)
            return context.attend_latent(call.backend, call.layer, **call.inputs, rope=rope)

        places = torch.arange(5).expand(3, 5)
        torch.testing.assert_close(attended(places), attended(None))
        torch.testing.assert_close(attended(places + 9), attended(None), atol=1e-4, rtol=1e-4)  # all move alike
        apart = attended(places * torch.tensor([[1], [2], [3]]))
        assert (apart - attended(None)).abs().max() > 0.01


def test_the_budget_is_divided_between_tokens_and_states(toys):
    config = EngineConfig(model=str(toys["toy-every-kind"][0]), device="cpu", max_num_seqs=16, max_model_len=160)
    ready = plan_engine(msgspec.structs.replace(config, kv_cache_bytes=200_000)).worker
    num_states, state_bytes, page_bytes = 1 + 16 + 2 + 8, 2 * 64 * 4, 16 * 2 * 2 * 16 * 4
    assert (ready.kv.num_states, ready.memory.num_states) == (num_states, num_states)
    assert ready.memory.state_sequence == state_bytes
    assert ready.kv.num_blocks == (200_000 - num_states * state_bytes) // page_bytes
    assert ready.memory.kv_cache == ready.kv.num_blocks * page_bytes + num_states * state_bytes
    with pytest.raises(KVCacheTooSmall, match="the states of 16 sequences take"):
        plan_engine(msgspec.structs.replace(config, kv_cache_bytes=9_000))


@pytest.mark.parametrize("toy", ["toy-state", "toy-latent"])
def test_a_device_without_such_kernels_refuses_by_name(toys, toy):
    reason = {"toy-state": "the recurrence gated_sum", "toy-latent": "latent attention"}[toy]
    with pytest.raises((Unsupported, ConfigError), match=reason):
        LLM(str(toys[toy][0]), skip_tokenizer=True, device="fake-hostlen", dtype="float32", max_model_len=160)


def test_what_states_rule_out_is_said_at_the_start(toys):
    config = EngineConfig(model=str(toys["toy-state"][0]), device="cpu", max_model_len=160, speculate="ngram")
    assert "a state cannot give a token back: no drafts for this model" in plan_engine(config).worker.notes


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 33])
def test_both_forms_of_a_gated_sum_agree(length):
    generator = torch.Generator().manual_seed(length)
    x, first = torch.randn(length, 5, generator=generator), torch.randn(5, generator=generator)
    gate = torch.rand(length, 5, generator=generator)
    gate[length // 2, :2] = torch.tensor([0.0, 1.0])
    one_by_one = gated_sum_recurrent(x, gate, first)
    torch.testing.assert_close(gated_sum_chunked(x, gate, first), one_by_one, rtol=1e-5, atol=1e-5)
    for cut in range(1, length):
        begun = gated_sum_chunked(x[:cut], gate[:cut], first)
        rest = gated_sum_chunked(x[cut:], gate[cut:], begun[-1])
        torch.testing.assert_close(torch.cat((begun, rest)), one_by_one, rtol=1e-5, atol=1e-5)
