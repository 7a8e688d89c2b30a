"""Greedy tokens equal transformers' under every way the engine can be run. Rules: anychip_conformance.equality."""

from __future__ import annotations

from pathlib import Path

import pytest
from judged import Oracles, as_expected

from anychip import SamplingParams
from anychip_conformance.equality.oracle import greedy, judge
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import (
    SELDOM,
    Case,
    covering,
    full_product,
    num_compilations,
    open_llm,
    prompts,
)

MAX_EXCUSED_SHARE = 0.01


def check(case: Case, oracles: Oracles) -> None:
    checkpoint, answers = oracles.get(case.family)
    with open_llm(case, checkpoint) as llm:
        compiled = num_compilations(llm)
        verdicts = as_expected(answers, llm)
        assert num_compilations(llm) == compiled, "a compiled platform compiles nothing after warm-up"
        scheduler = llm.engine.scheduler
        if case.preemption:
            assert scheduler.num_preemptions > 0, "the case was to force preemption"
        assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_usable
    excused = sum(v.excused for v in verdicts)
    assert excused <= MAX_EXCUSED_SHARE * len(verdicts), f"{excused} of {len(verdicts)} divergences were excused"


@pytest.mark.parametrize("case", covering(), ids=str)
def test_greedy_tokens_equal_transformers(case: Case, oracles: Oracles) -> None:
    check(case, oracles)


@pytest.mark.parametrize("family", SELDOM)
def test_families_of_known_parts_answer_a_few_prompts_as_transformers_does(family: str, tmp_path: Path) -> None:
    """In chunks of seven tokens, and over what the prefix cache found. The full product has every setting."""
    model, texts = make_checkpoint(family, tmp_path), [prompts()[index] for index in (7, 9, 2)]
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with open_llm(Case(family, 7, True, False, True, "cpu"), tmp_path) as llm:
        found = [output.outputs[0].token_ids for output in llm.generate(texts, sampling)]
    verdicts = [judge(greedy(model, text, 4), tokens) for text, tokens in zip(texts, found, strict=True)]
    assert not [v for v in verdicts if v.divergence is not None and not v.excused]


@pytest.mark.full
@pytest.mark.parametrize("case", full_product(), ids=str)
def test_greedy_tokens_equal_transformers_in_the_full_product(case: Case, oracles: Oracles) -> None:
    check(case, oracles)
