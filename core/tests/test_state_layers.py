"""State layers: both forms of every recurrence agree, and what the prefix cache keeps of states changes no token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anychip import LLM, SamplingParams
from anychip.errors import ConfigError, Unsupported
from anychip.ops.reference import RULES
from anychip.plugin_api import RECURRENCES, state_spec
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import prompts
from anychip_conformance.recurrence_calls import DIMS, drawn_case

FAMILIES = ("qwen3-next", "mamba2", "falcon-h1")
"""Attention beside states, states alone, and both in one layer."""
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
TEXT = prompts()[15]


@pytest.mark.parametrize("name", RECURRENCES)
@pytest.mark.parametrize("length", [1, 2, 5, 63, 64, 65, 150])
def test_both_forms_of_a_recurrence_agree(name, length):
    inputs, weights, first = drawn_case(name, length)
    rule, states, outputs = RULES[name], {key: held.unsqueeze(0) for key, held in first.items()}, []
    for token in range(length):
        found, states = rule.step({key: x[token : token + 1] for key, x in inputs.items()}, states, weights)
        outputs.append(found)
    whole, last = rule.chunk(inputs, first, weights)
    torch.testing.assert_close(whole, torch.cat(outputs), rtol=2e-5, atol=2e-5)
    for key, held in last.items():
        torch.testing.assert_close(held, states[key][0], rtol=2e-5, atol=2e-5)


def test_a_state_is_as_large_as_its_arrays_and_no_larger_for_longer_texts():
    spec = state_spec("ssd", "bfloat16", **DIMS)
    assert spec.canonical(1) == spec.canonical(10**6)
    assert [array.dtype for array in spec.arrays] == ["float32"]
    assert state_spec("causal_conv", "bfloat16", **DIMS).arrays[0].dtype == "bfloat16"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("states")
    for family in FAMILIES:
        make_checkpoint(family, folder / family)
    return {family: folder / family for family in FAMILIES}


def open_family(checkpoints, family: str, **settings) -> LLM:
    given = {"device": "cpu", "dtype": "float32", "max_model_len": 160, "max_num_seqs": 4, **settings}
    return LLM(str(checkpoints[family]), skip_tokenizer=True, **given)


def tokens(llm: LLM, *texts: list[int], sampling: SamplingParams = GREEDY) -> list[list[int]]:
    return [one.token_ids for output in llm.generate(list(texts), sampling) for one in output.outputs]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hit_at_every_length_answers_as_no_hit(checkpoints, family):
    """One text's beginnings, shortest first, each found as far as the one before left a state."""
    beginnings = [TEXT[:length] for length in range(1, 100, 3)]
    with open_family(checkpoints, family, prefix_caching=False) as llm:
        expected = tokens(llm, *beginnings)
    with open_family(checkpoints, family) as llm:
        assert [tokens(llm, text)[0] for text in beginnings] == expected
        scheduler = llm.engine.scheduler
        assert scheduler.prefix_hits > len(beginnings) * 16
        scheduler.kv.check_integrity([])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_of_two_prompts_computes_little_of_what_they_share(checkpoints, family):
    """The first ends where they part."""
    with open_family(checkpoints, family) as llm:
        tokens(llm, TEXT[:100])
        before = llm.engine.scheduler.prefix_hits
        tokens(llm, [*TEXT[:100], *range(20, 40)])
        assert llm.engine.scheduler.prefix_hits - before == 96


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_of_one_prompt_draw_the_same_with_and_without_prefix_caching(checkpoints, family):
    sampling, found = SamplingParams(n=3, temperature=1.0, seed=4, max_tokens=8, ignore_eos=True), []
    for caching in (False, True):
        with open_family(checkpoints, family, prefix_caching=caching) as llm:
            found.append(tokens(llm, TEXT[:50], sampling=sampling))
            assert (llm.engine.scheduler.prefix_hits > 0) == caching
    assert found[0] == found[1]


def test_a_device_without_a_recurrence_refuses_it_by_name(checkpoints):
    with pytest.raises((Unsupported, ConfigError), match="state layers of the recurrence causal_conv"):
        open_family(checkpoints, "mamba2", device="fake-hostlen")
