"""Steps that are recorded and replayed give what they give eagerly, to the bit, whatever a model is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from anychip import LLM, SamplingParams
from anychip.plugin_api import ShapeKey, Unsupported
from anychip.worker.head_steps import tap_every_token
from anychip_conformance.equality.tiny_adapters import FIVE
from anychip_conformance.equality.tiny_models import FAMILIES, THROUGH_TRANSFORMERS, make_checkpoint
from anychip_cpu import native
from anychip_cpu.graph import CpuGraphs, Recordings
from anychip_cpu.moe import GroupedMoE
from anychip_cpu.platform import CpuPlatform

pytestmark = pytest.mark.skipif(not native.usable(), reason="no kernels were compiled")

PROMPTS = [[(37 * i + length) % 500 + 3 for i in range(length)] for length in (1, 2, 5, 7, 40, 16)]
"""Several at once, and of them one with a prompt that no piece holds with the others'."""
REPEATING = [[5, 6, 7, 8] * 6, [9, 9, 9, 9, 9], [11, 12] * 8]
SEVERAL = ("llama", "gemma2", "qwen3-moe", "deepseek-v2", "granite", "bamba")
"""Plain layers; windows, caps and scales; experts; latents and groups; multipliers; states beside attention."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made: dict[str, Path] = {}

    def at(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_checkpoint(family, made[family])
        return made[family]

    return at


@contextlib.contextmanager
def engine(folder: Path, graphs: bool, **settings: Any) -> Iterator[LLM]:
    fixed = {"device": "cpu", "dtype": "bfloat16", "skip_tokenizer": True, "max_num_seqs": 8, "max_model_len": 128}
    options = {"threads": "1", "graphs": str(graphs)}
    with LLM(str(folder), device_options=options, **{**fixed, **settings}) as llm:
        yield llm


def answers(llm: LLM, prompts: Sequence[list[int]] = PROMPTS, **asked: Any) -> list[object]:
    """Tokens and log-probabilities of greedy and seeded requests, which end one after the other: twice, the second time
    from a full prefix cache and recordings. Where none are asked for, draws are recorded too."""
    params = [
        SamplingParams(max_tokens=4 + row, temperature=0.8 * (row % 2), seed=row, ignore_eos=True, **asked)
        for row in range(len(prompts))
    ]
    found = [output.outputs[0] for _ in range(2) for output in llm.generate(prompts, params)]
    return [(list(each.token_ids), repr(each.logprobs)) for each in found]


def program(llm: LLM) -> Any:
    return llm.engine.executor.worker.program


def both(folder: Path, prompts: Sequence[list[int]] = PROMPTS, **settings: Any) -> None:
    with engine(folder, True, **settings) as llm:
        recorded = [answers(llm, prompts, logprobs=2), answers(llm, prompts[:3])]
        assert len(program(llm)._steps) and not program(llm)._captures.refused
    with engine(folder, False, **settings) as llm:
        assert recorded == [answers(llm, prompts, logprobs=2), answers(llm, prompts[:3])]


@pytest.mark.parametrize("family", SEVERAL)
def test_families_answer_as_they_do_eagerly(checkpoint, family):
    both(checkpoint(family))


@pytest.mark.full
@pytest.mark.parametrize("family", sorted({*FAMILIES, *THROUGH_TRANSFORMERS} - {*SEVERAL, "nemotron-h-moe"}))
def test_every_family_answers_as_it_does_eagerly(checkpoint, family):
    """But experts without a gate: torch runs them, and reads on the host who is picked."""
    both(checkpoint(family))


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization": "int4"},
        {"quantization": "int8", "kv_cache_dtype": "fp8"},
        {"speculate": "ngram", "max_drafts": 3},
        {"dtype": "float32"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_settings_answer_as_they_do_eagerly(checkpoint, settings):
    both(checkpoint("llama"), REPEATING if "speculate" in settings else PROMPTS, **settings)


def test_steps_with_adapters_and_without_answer_as_they_do_eagerly(checkpoint, tmp_path):
    folder = checkpoint("llama")
    adapter = FIVE[1].save(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "a")
    found = []
    for graphs in (True, False):
        with engine(folder, graphs, adapters={"a": str(adapter)}) as llm:
            several = [None, "a", None, "a", "a", None]
            params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=1)
            mixed = llm.generate(PROMPTS, params, adapter=several)
            plain = llm.generate(PROMPTS, params)
            found.append([(list(o.outputs[0].token_ids), repr(o.outputs[0].logprobs)) for o in (*mixed, *plain)])
            if graphs:
                features = {key.features for key in program(llm)._steps.made}
                assert ("adapters",) in features and () in features
    assert found[0] == found[1]
    assert found[0][: len(PROMPTS)] != found[0][len(PROMPTS) :]


def test_taps_are_what_they_are_eagerly(checkpoint):
    found = []
    for graphs in (True, False):
        with engine(checkpoint("gemma2"), graphs, taps=(0, 2, -1)) as llm:
            runner, seen = llm.engine.executor.worker.runner, list[torch.Tensor]()
            runner.batch.every_step = tap_every_token
            runner.read_taps = lambda inputs, taps, seen=seen: seen.extend(
                tap[: inputs.num_tapped].clone() for tap in taps
            )
            answers(llm)
            found.append(seen)
    assert len(found[0]) == len(found[1]) > 40
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_what_cannot_be_recorded_runs_eagerly_at_its_own_size(checkpoint, monkeypatch):
    """Experts that are sorted on the host: the engine says so, and pads nothing."""
    monkeypatch.setattr(CpuPlatform, "moe", lambda self, spec: GroupedMoE(spec, self))
    found = []
    for graphs in (True, False):
        with engine(checkpoint("qwen3-moe"), graphs) as llm:
            found.append(answers(llm, logprobs=1))
            worker = llm.engine.executor.worker
            assert len(program(llm)._steps) == 0
            key = worker.runner.batch.policy.bucket(
                num_tokens=3, num_reqs=3, num_samples=3, max_query_len=1, num_pages=2, features=()
            )
            assert (key.num_tokens, key.num_pages) == (3, 2)
            assert graphs == any("steps run without graphs" in note for note in worker.ready.notes)
    assert found[0] == found[1]


def test_recordings_are_as_few_as_the_policy_says(checkpoint):
    with engine(checkpoint("llama"), True) as llm:
        for count in range(1, 9):
            llm.generate(PROMPTS[:1] * count, SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
        made = program(llm)
        tokens = {key.num_tokens for key in made._steps.made}
        assert tokens == {1, 5, 17}, "steps of 1 to 8 rows"
        assert len(made._steps) + len(made._pieces) <= 8
        assert made.graphs._arena.nbytes < 4 << 20


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "reads",
    [
        torch.Tensor.item,
        torch.Tensor.nonzero,
        bool,
        torch.where,
        torch.argwhere,
        lambda x: x[x > 0],
        torch.Tensor.tolist,
        torch.Tensor.numpy,
    ],
)
def test_a_value_that_is_read_is_refused(reads, inference):
    kernels = native.load("")
    graphs, x = CpuGraphs(kernels, Recordings()), torch.ones(1)
    key = ShapeKey(num_tokens=1, num_reqs=1, num_samples=1, max_query_len=1, num_pages=1)
    with torch.inference_mode(inference):
        with pytest.raises(Unsupported, match="depends on a value"):
            graphs.capture(lambda: reads(x), key)
        assert graphs.run(graphs.capture(lambda: x + 1, key), []) == 2, "the next one is none the worse"
