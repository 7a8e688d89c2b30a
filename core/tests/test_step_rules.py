"""Every shape that core asks a device for obeys the device's rules and the limits that its policy was made with."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip import LLM, SamplingParams
from anychip.plugin_api import (
    API_VERSION,
    DeviceInfo,
    Platform,
    PlatformManifest,
    ProbeResult,
    ShapeKey,
    ShapePolicy,
    StepLimits,
    StepProgram,
    StepRules,
)
from anychip.registry.plugins import Plugins
from anychip.worker.largest_steps import largest_prompts, largest_steps, step_memory

maybe = st.none() | st.integers(1, 300)
RULES = st.builds(
    StepRules,
    mix_prefill_decode=st.booleans(),
    max_prefills=st.none() | st.integers(1, 4),
    max_tokens=maybe,
    max_rows=st.none() | st.integers(1, 20),
    max_padded_tokens=maybe,
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 16,
    "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "eos_token_id": 2,
}  # fmt: skip


@st.composite
def limited(draw: st.DrawFn) -> tuple[StepRules, StepLimits]:
    rules = draw(RULES)
    rows = draw(st.integers(1, rules.max_rows or 40))
    limits = StepLimits(
        max_num_tokens=draw(st.integers(1, rules.max_tokens or 600)),
        max_num_reqs=rows,
        max_model_len=draw(st.integers(2, 400)),
        max_slots=rows,
        max_pages=(draw(st.integers(1, 30)),),
    )
    return rules, limits


def check(rules: StepRules, limits: StepLimits, tokens: int, rows: int, longest: int) -> None:
    assert 1 <= rows <= min(limits.max_num_reqs, rules.max_rows or rows)
    assert 1 <= tokens <= limits.max_num_tokens
    assert 1 <= longest <= limits.max_model_len and longest + rows - 1 <= tokens <= longest * rows
    assert rules.max_padded_tokens is None or rows * longest <= rules.max_padded_tokens


@given(limited())
def test_the_steps_that_memory_is_asked_of_obey_the_rules(given):
    rules, limits = given
    for step in largest_steps(rules, limits):
        check(rules, limits, sum(step), len(step), max(step))
        assert not rules.broken_by(step)


@given(limited(), st.integers(1, 700))
def test_the_step_that_is_measured_obeys_the_rules_and_fills_what_it_may(given, tokens):
    rules, limits = given
    step = largest_prompts(rules, limits, tokens)
    check(rules, limits, sum(step), len(step), max(step))
    assert not rules.broken_by(step)
    assert sum(step) <= tokens and max(step) < limits.max_model_len
    if rules == StepRules():
        room = limits.max_num_reqs * max(1, limits.max_model_len - 1)
        assert sum(step) == min(tokens, limits.max_num_tokens, room)


@pytest.mark.parametrize(
    ("rules", "counts", "said"),
    [
        (StepRules(mix_prefill_decode=False), [5, 1], "1 of 2 rows have more than one token"),
        (StepRules(mix_prefill_decode=False), [5, 2], ""),
        (StepRules(mix_prefill_decode=False), [1, 1], ""),
        (StepRules(max_prefills=1), [2, 2], "max_prefills is 1, and the step has 2"),
        (StepRules(max_padded_tokens=8), [1, 5], "max_padded_tokens is 8, and the step has 10"),
        (StepRules(max_tokens=4, max_rows=2), [2, 3], "max_tokens is 4, and the step has 5"),
        (StepRules(), [100, 1, 7], ""),
    ],
)
def test_a_step_that_breaks_a_rule_is_told_which(rules, counts, said):
    assert said in rules.broken_by(counts) and bool(said) == bool(rules.broken_by(counts))


def test_a_program_is_asked_for_the_memory_of_shapes_that_its_policy_has():
    class OneRow(ShapePolicy):
        def bucket(self, *, num_tokens, num_reqs, num_samples, max_query_len, num_pages, features):
            assert num_reqs * max_query_len <= 64 and max_query_len <= 32, "beyond the rectangle"
            return ShapeKey(
                num_tokens=num_tokens,
                num_reqs=num_reqs,
                num_samples=num_samples,
                max_query_len=max_query_len,
                num_pages=num_pages,
            )

    class Program(StepProgram):
        def memory(self, key: ShapeKey) -> int:
            return key.num_tokens + 1000 * key.num_reqs

    limits = StepLimits(max_num_tokens=512, max_num_reqs=8, max_model_len=32, max_slots=8, max_pages=(2,))
    assert step_memory(Program(), OneRow(), StepRules(max_padded_tokens=64), limits) == 8064


class Asked(ShapePolicy):
    """Has what rules and limits allow, and nothing else."""

    def __init__(self, rules: StepRules, limits: StepLimits) -> None:
        self.rules, self.limits = rules, limits

    def bucket(self, *, num_tokens, num_reqs, num_samples, max_query_len, num_pages, features):
        check(self.rules, self.limits, num_tokens, num_reqs, max_query_len)
        assert num_pages <= max(self.limits.max_pages)
        return super().bucket(
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            num_samples=num_samples,
            max_query_len=max_query_len,
            num_pages=num_pages,
            features=features,
        )


class StrictPlatform(Platform):
    """Takes no shape beyond its rules."""

    def kv_budget(self, profile: object) -> int:
        return 2**18

    def shape_policy(self, limits: StepLimits) -> ShapePolicy:
        return Asked(self.step_rules, limits)


STRICT = PlatformManifest(
    name="strict",
    package="anychip-strict",
    api_version=API_VERSION,
    summary="",
    probe=f"{__name__}:probe",
    platform=f"{__name__}:StrictPlatform",
)


def probe() -> ProbeResult:
    return ProbeResult(devices=(DeviceInfo(index=0, name="x"),))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


@settings(max_examples=8, deadline=None)
@given(RULES, st.integers(1, 6), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_a_whole_run_asks_for_nothing_beyond_the_rules(model, rules, rows, lengths):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StrictPlatform, "step_rules", rules)
        for module in ("launch.llm", "worker.worker"):
            patch.setattr(f"anychip.{module}.load_plugins", lambda: Plugins(platforms={"strict": STRICT}))
        settings = {"max_num_seqs": rows, "max_num_batched_tokens": 48, "max_model_len": 48}
        with LLM(model, device="strict", load_format="dummy", skip_tokenizer=True, **settings) as llm:
            prompts = [list(range(3, 3 + length)) for length in lengths]
            outputs = llm.generate(prompts, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [4] * len(lengths)
