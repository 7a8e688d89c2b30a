"""Every way to ask for tokens gives the same with drafts and without: text, ends, log-probabilities."""

from __future__ import annotations

import json

import pytest

from anychip import LLM, SamplingParams
from anychip.sampling_params import StructuredOutput
from anychip_conformance import drafts

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"first_name": {"type": "string", "maxLength": 8}, "is_married": {"type": "boolean"}},
        "required": ["first_name", "is_married"],
        "additionalProperties": False,
    }
)
PROMPTS = [
    "def add(a, b):\n    return a + b\n\n\ndef add(a, b):\n    return",
    "one two three four, one two three four, one two",
    "Hello",
]
ASKED = {
    "greedy": SamplingParams(temperature=0, max_tokens=40),
    "several": SamplingParams(temperature=0.9, seed=7, n=3, max_tokens=24),
    "edited": SamplingParams(
        temperature=0.7, seed=3, max_tokens=30, repetition_penalty=1.2, presence_penalty=0.4, logit_bias={11: 2.0}
    ),
    "log-probabilities": SamplingParams(temperature=0.5, seed=9, max_tokens=20, logprobs=3, min_tokens=8),
    "words": SamplingParams(temperature=0, max_tokens=40, stop=("two t",), bad_words=("add",)),
    "json": SamplingParams(temperature=0.8, seed=1, max_tokens=60, structured=StructuredOutput("json_schema", SCHEMA)),
    "choice": SamplingParams(temperature=0, max_tokens=20, structured=StructuredOutput("regex", "(yes|no), (yes|no)")),
}


def answers(speculate: str | None, **settings) -> tuple[dict, object]:
    with LLM(device="cpu", dtype="float32", max_model_len=256, speculate=speculate, **settings) as llm:
        if llm.engine.scheduler.drafting is not None:
            llm.engine.scheduler.drafting.measured_costs_are_ignored()
        outputs = {name: llm.generate(PROMPTS, sampling) for name, sampling in ASKED.items()}
        stats = llm.engine.scheduler.stats.speculation
        llm.engine.drain()
        pool = llm.engine.scheduler.kv.pool
        assert pool.num_free == pool.num_usable
    drafts.Answers.texts = [
        [*output.prompt_token_ids, *sequence.token_ids]
        for each in outputs.values()
        for output in each
        for sequence in output.outputs
    ]
    found = {
        name: [
            (one.token_ids, one.text, one.finish_reason, [entry.top_ids for entry in one.logprobs or ()])
            for output in each
            for one in output.outputs
        ]
        for name, each in outputs.items()
    }
    return found, stats


@pytest.fixture(scope="module")
def without() -> dict:
    return answers(None)[0]


@pytest.mark.parametrize("speculate", ["suffix", "ngram", drafts.NAME])
def test_answers_are_those_without_drafts(without, speculate):
    found, stats = answers(speculate)
    for name, expected in without.items():
        assert found[name] == expected, name
    assert stats.accepted > 20 and stats.failures == 0


def test_answers_are_those_without_drafts_when_blocks_are_short(without):
    found, stats = answers(drafts.NAME, num_kv_blocks=20, max_num_batched_tokens=24)
    for name, expected in without.items():
        assert found[name] == expected, name
    assert stats.accepted > 20


@pytest.mark.full
def test_ranks_agree_on_what_they_keep():
    expected, _ = answers(None, tensor_parallel_size=2)
    found, stats = answers(drafts.NAME, tensor_parallel_size=2)
    assert found == expected and stats.accepted > 20


def test_a_grammar_forces_tokens_for_free():
    """Keys and punctuation of JSON are drafted, though nothing stood there before."""
    with LLM(device="cpu", max_model_len=256, speculate="ngram") as llm:
        llm.engine.scheduler.drafting.measured_costs_are_ignored()
        (output,) = llm.generate(["Hello"], ASKED["json"])
        steps, accepted = llm.engine.scheduler.stats.steps, llm.engine.scheduler.stats.speculation.accepted
    assert {"first_name", "is_married"} == set(json.loads(output.outputs[0].text))
    assert accepted >= 4 and steps <= len(output.outputs[0].token_ids) - accepted + 1
