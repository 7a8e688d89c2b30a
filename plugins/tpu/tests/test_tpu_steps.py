"""The step program over a runtime of the host, which compiles nothing: what it computes, and what it gives away."""

from __future__ import annotations

from pathlib import Path

import pytest
from host_runtime import HostRuntime, on_the_host

from anychip import SamplingParams
from anychip_conformance.equality.oracle import greedy, judge
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import NUM_TOKENS, prompts

SETTINGS = {"skip_tokenizer": True, "dtype": "float32", "max_model_len": 160, "max_num_seqs": 16}


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-moe", "gpt-oss"])
def test_greedy_tokens_equal_transformers(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path / family)
    asked = prompts()[5:11]
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in asked]
    with on_the_host(tmp_path / family, **SETTINGS) as llm:
        outputs = llm.generate(asked, SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True))
    for answer, output in zip(expected, outputs, strict=True):
        assert judge(answer, list(output.outputs[0].token_ids)).divergence is None


def test_steps_with_features_draw_from_the_full_program(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    plain = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    favoured = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logit_bias={7: 100.0}, logprobs=3)
    with on_the_host(tmp_path, **SETTINGS) as llm:
        alone = llm.generate([[5, 6, 7]], plain)[0].outputs[0].token_ids
        biased, beside = llm.generate([[5, 6, 7], [5, 6, 7]], [favoured, plain])
    assert list(biased.outputs[0].token_ids) == [7] * 8
    assert len(biased.outputs[0].logprobs) == 8
    assert beside.outputs[0].token_ids == alone


def test_one_compilation_for_each_shape_and_draw_and_none_later(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    with on_the_host(tmp_path, **SETTINGS) as llm:
        program = llm.engine.executor.worker.program
        assert isinstance(program.runtime, HostRuntime)
        compiled = program.runtime.num_compilations
        assert compiled == len(program._forwards) + len(program._draws) + len(program._between)
        llm.generate(prompts()[:8], SamplingParams(max_tokens=8, temperature=0.8, top_p=0.9, ignore_eos=True))
        assert program.runtime.num_compilations == compiled
