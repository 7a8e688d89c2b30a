"""What the engine computes on a device, against transformers: prompt log-probabilities, beams, penalties; and outputs
that follow a grammar."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM

from anychip import LLM, SamplingParams
from anychip.errors import InvalidRequest
from anychip.hub import resolve_folder
from anychip.sampling_params import StructuredOutput

TEXT = "def reverse(items):\n    return items[::-1]\n\n\nclass Stack:\n    def __init__(self):\n        self.items ="


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """In float32, and with chunks shorter than the prompts."""
    with LLM("quickstart", device="cpu", dtype="float32", kv_cache_bytes=2**26, max_num_batched_tokens=24) as running:
        yield running


@pytest.fixture(scope="module")
def theirs() -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve_folder("quickstart"), dtype=torch.float32)


def free_blocks(llm: LLM) -> tuple[int, int]:
    pool = llm.engine.scheduler.kv.pool
    return pool.num_free, pool.num_usable


def test_prompt_logprobs_are_the_models_across_chunks_and_prefix_hits(llm, theirs):
    ids = llm.tokenizer.encode(TEXT)
    assert len(ids) > 24, "the prompt must take several chunks"
    with torch.inference_mode():
        expected = torch.log_softmax(theirs(torch.tensor([ids])).logits[0], dim=-1)
    for _ in range(2):  # the second time the prompt's blocks are in the prefix cache
        (output,) = llm.generate([ids], SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3))
        assert len(output.prompt_logprobs) == len(ids) - 1
        for position, entry in enumerate(output.prompt_logprobs):
            assert entry.chosen == pytest.approx(expected[position, ids[position + 1]].item(), abs=1e-3)
            assert entry.top == pytest.approx(expected[position].topk(3).values.tolist(), abs=1e-3)
    (plain,) = llm.generate([ids], SamplingParams(temperature=0, max_tokens=2))
    assert plain.cached_tokens > 0 and plain.prompt_logprobs is None


def test_prompt_logprobs_survive_a_preemption(llm):
    ids = llm.tokenizer.encode(TEXT)
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0)
    (expected,) = llm.generate([ids], params)
    request = llm.inputs.process("preempted", ids, params)
    llm.engine.add(request)
    llm.outputs.add(request)
    found = None
    for step in range(100):
        if step in (1, 3) and llm.engine.scheduler.running:
            llm.engine.scheduler.preempt(llm.engine.scheduler.running[0])
        for delta in llm.engine.step():
            output, _ = llm.outputs.process(delta)
            found = output.prompt_logprobs or found
            if output.finished:
                assert [entry.chosen for entry in found] == pytest.approx(
                    [entry.chosen for entry in expected.prompt_logprobs], abs=1e-4
                )
                return
    raise AssertionError("the request did not end")


@pytest.mark.parametrize(("width", "n", "penalty"), [(1, 1, 1.0), (2, 1, 2.0), (4, 4, 1.0), (5, 3, 0.5)])
def test_beams_are_those_of_transformers(llm, theirs, width, n, penalty):
    ids = llm.tokenizer.encode("def add(a, b):\n")
    params = SamplingParams(max_tokens=16, beam_width=width, n=n, length_penalty=penalty)
    (output,) = llm.generate([ids], params)
    expected = theirs.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        num_beams=width,
        num_return_sequences=n,
        max_new_tokens=16,
        do_sample=False,
        length_penalty=penalty,
        early_stopping=False,
        repetition_penalty=1.0,
        pad_token_id=0,
    )
    for ours, hypothesis in zip(output.outputs, expected[:, len(ids) :].tolist(), strict=True):
        assert ours.token_ids == hypothesis[: len(ours.token_ids)]
        assert all(token == 0 for token in hypothesis[len(ours.token_ids) :])
    assert free_blocks(llm)[0] == free_blocks(llm)[1]


def test_repetition_penalty_is_that_of_transformers(llm, theirs):
    ids = llm.tokenizer.encode("import")
    params = SamplingParams(temperature=0, max_tokens=24, repetition_penalty=1.3, ignore_eos=True)
    (output,) = llm.generate([ids], params)
    expected = theirs.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=24,
        do_sample=False, repetition_penalty=1.3, eos_token_id=-1, pad_token_id=0,
    )  # fmt: skip
    assert output.outputs[0].token_ids == expected[0, len(ids) :].tolist()


def test_penalties_survive_preemptions_and_hold_for_each_sequence(llm):
    ids = llm.tokenizer.encode("import")
    params = SamplingParams(
        n=2, seed=3, max_tokens=24, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=1.0,
        logit_bias={77: 2.0}, ignore_eos=True,
    )  # fmt: skip
    (expected,) = llm.generate([ids], params)
    request = llm.inputs.process("preempted", ids, params)
    llm.engine.add(request)
    found: dict[int, list[int]] = {0: [], 1: []}
    step = 0
    while llm.engine.has_work:
        step += 1
        if step % 5 == 0 and llm.engine.scheduler.running:
            llm.engine.scheduler.preempt(llm.engine.scheduler.running[0])
        for delta in llm.engine.step():
            found[delta.index] += delta.token_ids
    assert [found[0], found[1]] == [output.token_ids for output in expected.outputs]
    assert found[0] != found[1]


def test_biases_and_restrictions_hold_for_their_row_alone(llm):
    free, biased, allowed = llm.generate(
        ["x = "] * 3,
        [
            SamplingParams(temperature=0, max_tokens=5),
            SamplingParams(temperature=0, max_tokens=5, logit_bias={77: 100}),
            SamplingParams(temperature=1, max_tokens=5, allowed_token_ids=(5, 6), seed=1),
        ],
    )
    (alone,) = llm.generate(["x = "], SamplingParams(temperature=0, max_tokens=5))
    assert free.outputs[0].token_ids == alone.outputs[0].token_ids
    assert biased.outputs[0].token_ids == [77] * 5
    assert set(allowed.outputs[0].token_ids) <= {5, 6}


def test_a_bad_word_does_not_come(llm):
    (free,) = llm.generate(["class A:\n    def f("], SamplingParams(temperature=0, max_tokens=8))
    word = free.outputs[0].text.split(",")[0].split(")")[0].strip()
    assert word
    params = SamplingParams(temperature=0, max_tokens=8, bad_words=(word,))
    (output,) = llm.generate(["class A:\n    def f("], params)
    assert word not in output.outputs[0].text


def test_a_stop_that_is_kept_is_in_the_text(llm):
    stops = {"stop": ("items",), "temperature": 0, "max_tokens": 12}
    cut, kept = llm.generate(
        [TEXT] * 2, [SamplingParams(**stops), SamplingParams(**stops, include_stop_str_in_output=True)]
    )
    if cut.outputs[0].finish_reason == "stop":
        assert kept.outputs[0].text == cut.outputs[0].text + "items"
    assert cut.outputs[0].stop_reason == kept.outputs[0].stop_reason


# -- grammars ---------------------------------------------------------------------------------------------


def structured(kind: str, value: str = "", **more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 200, "seed": 1, "structured": StructuredOutput(kind, value)} | more)


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Bounded: no output is longer than its schema says."""
    kinds = ["integer", "boolean", "null", "string", "enum", "pattern"] + ["object", "array"] * (depth < 2)
    match rng.choice(kinds):
        case "integer":
            low = rng.randrange(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(100)}
        case "string":
            return {"type": "string", "minLength": rng.randrange(3), "maxLength": 3 + rng.randrange(6)}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-f]{2,5}$", "^(ab|cd)+x$"]), "maxLength": 9}
        case "enum":
            return {"enum": rng.sample(["red", "green", 3, None, True, "blue\n", "ü"], 3)}
        case "object":
            names = rng.sample(["a", "name", "ü", "x y", "n1"], rng.randrange(1, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth + 1) for name in names},
                "required": names[: rng.randrange(len(names) + 1)],
                "additionalProperties": False,
            }
        case "array":
            return {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": rng.randrange(4)}
        case kind:
            return {"type": kind}


def test_outputs_of_500_random_schemas_parse_and_validate(llm):
    rng = random.Random(5)
    schemas = [random_schema(rng) for _ in range(500)]
    params = [
        structured("json_schema", json.dumps(schema), max_tokens=1500, seed=number)
        for number, schema in enumerate(schemas)
    ]
    outputs = llm.generate(["# JSON:\n"] * len(schemas), params)
    for schema, output in zip(schemas, outputs, strict=True):
        assert output.outputs[0].finish_reason == "stop"
        jsonschema.validate(json.loads(output.outputs[0].text), schema)


def test_a_schema_that_max_tokens_cuts_says_length(llm):
    schema = json.dumps({"type": "string", "minLength": 400})
    (output,) = llm.generate(["x"], structured("json_schema", schema, max_tokens=10))
    assert output.outputs[0].finish_reason == "length"


def test_expressions_choices_grammars_and_objects_hold(llm):
    regex, choice, grammar, anything = llm.generate(
        ["x"] * 4,
        [
            structured("regex", r"[a-c]{5}-\d+", n=3, temperature=1.5),
            structured("choice", '["positive", "neg\\"ative"]'),
            structured("grammar", 'start: "a" start "b" | "c"', temperature=2.0),
            structured("json_object"),
        ],
    )
    assert all(re.fullmatch(r"[a-c]{5}-\d+", o.text) or o.finish_reason == "length" for o in regex.outputs)
    assert len({o.text for o in regex.outputs}) == 3
    assert choice.outputs[0].text in ("positive", 'neg"ative')
    counts = re.fullmatch(r"(a*)c(b*)", grammar.outputs[0].text)
    assert grammar.outputs[0].finish_reason == "length" or len(counts[1]) == len(counts[2])
    assert anything.outputs[0].finish_reason == "length" or isinstance(json.loads(anything.outputs[0].text), dict)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("json_schema", '{"type": "object", "if": {}}', 'Unimplemented keys: \\["if"\\]'),
        ("json_schema", "[", "json_schema cannot be followed"),
        ("json_schema", "[" * 100 + "]" * 100, "nests 100 levels, at most 64"),
        ("json_schema", '{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}', "no output satisfies it"),
        ("regex", "(", "regex parse error"),
        ("regex", "x" * 300_000, "300000 bytes, at most 262144"),
        ("choice", "[]", "choice takes 1 to 4096 texts"),
        ("grammar", "start: /x", "grammar cannot be followed"),
    ],
)
def test_grammars_that_cannot_be_are_refused_and_nothing_is_left(llm, kind, value, expected):
    request = llm.inputs.process("bad", "x", structured(kind, value))
    llm.engine.add(request)
    deltas = []
    while llm.engine.has_work:
        deltas += llm.engine.step()
    (error,) = [delta.error for delta in deltas if delta.error]
    assert error[0] == InvalidRequest.__name__
    assert re.search(expected, error[1]), error[1]
    assert not llm.engine.scheduler.requests
