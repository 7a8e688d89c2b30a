"""A draft model has computed what it drafts from, however the engine is run: one that equals the target is always
right. What it lacks, or has of other tokens, would show as a draft that is not drawn.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from followed_drafts import watched_drafts

from anychip import LLM, SamplingParams
from anychip.config import EngineConfig
from anychip.errors import ConfigError, Unsupported
from anychip.hub import resolve_folder
from anychip.launch.plan import plan_engine
from anychip.types import QUICKSTART
from anychip.worker.draft_runner import DraftRunner
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import Case, cover, full_product, generate, open_llm, pairs, prompts
from anychip_conformance.toys.checkpoint import make_toy

FAMILIES = ("llama", "qwen3", "gemma3", "gpt-oss")
DEVICES = ("cpu", "cpu-tp2", "fake-hostlen")
MAX_DRAFTS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def checkpoint(folder: Path, family: str) -> Path:
    if not (folder / family).exists():
        make_checkpoint(family, folder / family)
    return folder / family


def ways() -> list[Case]:
    cases = [case for case in full_product() if case.family in FAMILIES and case.device in DEVICES]
    return cover([case for case in cases if case.budget > 7], pairs)


def check(case: Case, folder: Path) -> None:
    """Greedy, twice: the second round finds the first one's blocks."""
    model = checkpoint(folder, case.family)
    with open_llm(case, model) as llm:
        expected = list(generate(llm))
    with open_llm(case, model, speculate=f"draft:{model}", max_drafts=MAX_DRAFTS) as llm:
        scheduler = llm.engine.scheduler
        scheduler.drafting.measured_costs_are_ignored()
        for _ in range(2):
            assert list(generate(llm)) == expected
        llm.engine.drain()
        assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_usable
        stats = scheduler.stats
    assert stats.prefix_hits > 0 or not case.prefix_caching or case.device == "fake-hostlen"
    assert stats.speculation.drafted == stats.speculation.accepted > 20, stats.speculation


@pytest.mark.full
@pytest.mark.parametrize("case", ways(), ids=str)
def test_a_draft_model_that_equals_the_target_is_always_right(case, folder):
    check(case, folder)


WAYS = [
    Case("llama", budget=24, prefix_caching=True, preemption=True, overlap=True, device="cpu"),
    Case("gemma3", budget=64, prefix_caching=True, preemption=True, overlap=False, device="cpu"),
]


@pytest.mark.parametrize("case", WAYS, ids=str)
def test_it_is_right_in_chunks_behind_prefix_hits_and_after_preemption(case, folder):
    check(case, folder)


@pytest.mark.parametrize("how_often", [1.0, 0.3], ids=["always", "now and then"])
@pytest.mark.parametrize("case", [WAYS[0], pytest.param(WAYS[1], marks=pytest.mark.full)], ids=str)
def test_drafts_are_what_the_draft_model_says_of_the_text_by_itself(case, how_often, folder, monkeypatch):
    """Of sampled texts, which leave the guesses often. Now and then: the draft model is asked in a third of the steps,
    as if drafts paid in those alone, and has to catch up with tokens and with blocks that it never saw."""
    model, watched = checkpoint(folder, case.family), watched_drafts(monkeypatch, how_often)
    sampling = SamplingParams(temperature=0.4, seed=1, n=2, max_tokens=24, ignore_eos=True)
    with open_llm(case, model, speculate=f"draft:{model}", max_drafts=MAX_DRAFTS) as llm:
        llm.engine.scheduler.drafting.measured_costs_are_ignored()
        for _ in range(2):
            llm.generate(prompts(), sampling)
        stats = llm.engine.scheduler.stats.speculation
    drafted = [(text, ids) for text, ids in watched if min(ids) >= 0]  # it has caught up with the row
    assert 0 < stats.accepted < stats.drafted and len(drafted) > 50
    greedy = [SamplingParams(temperature=0, max_tokens=len(ids), ignore_eos=True) for _, ids in drafted]
    roomy = Case(case.family, budget=4096, prefix_caching=False, preemption=False, overlap=True, device="cpu")
    with open_llm(roomy, model) as llm:
        outputs = llm.generate([text for text, _ in drafted], greedy)
    assert [output.outputs[0].token_ids for output in outputs] == [ids for _, ids in drafted]


def test_a_pass_takes_one_token_and_the_first_one_what_is_new(monkeypatch):
    """Where all guesses were right, the last of them was no input yet: two tokens are new."""
    launch, passes = DraftRunner._launch, []
    monkeypatch.setattr(
        DraftRunner,
        "_launch",
        lambda self, slots, counts: (passes.append(counts.tolist()), launch(self, slots, counts))[1],
    )
    with LLM(device="cpu", dtype="float32", max_model_len=256, speculate="draft:quickstart", max_drafts=4) as llm:
        llm.engine.scheduler.drafting.measured_costs_are_ignored()
        sampling = SamplingParams(temperature=0, max_tokens=21, ignore_eos=True)
        (output,) = llm.generate(["def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return"], sampling)
        stats = llm.engine.scheduler.stats.speculation
    assert stats.drafted == stats.accepted == 16
    assert passes == [[len(output.prompt_token_ids) + 1], *[[1]] * 3, *[[2], [1], [1], [1]] * 3]


def test_texts_beyond_the_draft_models_positions_go_on_without_drafts(tmp_path):
    make_checkpoint("llama", tmp_path / "target")
    make_checkpoint("llama", tmp_path / "draft")
    config = tmp_path / "draft" / "config.json"
    config.write_bytes(msgspec.json.encode(msgspec.json.decode(config.read_bytes()) | {"max_position_embeddings": 80}))
    case = Case("llama", budget=64, prefix_caching=True, preemption=False, overlap=True, device="cpu")
    found = []
    for settings in ({}, {"speculate": f"draft:{tmp_path / 'draft'}", "max_drafts": 4}):
        with open_llm(case, tmp_path / "target", **settings) as llm:
            if settings:
                llm.engine.scheduler.drafting.measured_costs_are_ignored()
            found.append(list(generate(llm)))
            stats = llm.engine.scheduler.stats.speculation
    assert found[0] == found[1]
    beyond = sum(len(prompt) >= 80 for prompt in prompts())
    assert beyond == 4 and stats.drafted == stats.accepted > 20


# -- memory -------------------------------------------------------------------------------------------------


def test_memory_is_counted_once_and_predicted(folder):
    model = checkpoint(folder, "llama")
    given = {
        "device": "cpu",
        "skip_tokenizer": True,
        "max_model_len": 160,
        "kv_cache_bytes": 1 << 20,
        "dtype": "float32",
    }
    config = EngineConfig(model=str(model), **given, max_num_seqs=64, speculate=f"draft:{model}")
    planned = plan_engine(config).worker.memory
    with LLM(str(model), **given, max_num_seqs=64) as llm:
        alone = llm.worker.memory
    with LLM(str(model), **given, max_num_seqs=64, speculate=f"draft:{model}") as llm:
        memory = llm.worker.memory
    assert memory.weights == 2 * alone.weights == planned.weights
    assert memory.num_blocks == alone.num_blocks // 2 == planned.num_blocks, "a block holds both models' pages"
    assert memory.kv_cache == planned.kv_cache <= 1 << 20


# -- what is refused ----------------------------------------------------------------------------------------


def refusal(speculate: str, error: type[Exception] = ConfigError, **settings) -> str:
    given = {"device": "cpu", "max_model_len": 64, "num_kv_blocks": 32, **settings}
    with pytest.raises(error) as raised:
        LLM(speculate=speculate, **given)
    return str(raised.value)


def test_a_draft_model_of_another_vocabulary_is_refused_with_both_sizes(folder):
    said = refusal(f"draft:{checkpoint(folder, 'llama')}")
    assert "vocabulary of 512 tokens" in said and "8192" in said and str(folder / "llama") in said


def test_a_draft_model_of_another_tokenizer_is_refused_with_both_named(folder, tmp_path):
    for file in resolve_folder(QUICKSTART).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = msgspec.json.decode((tmp_path / "tokenizer.json").read_bytes())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer.json").write_bytes(msgspec.json.encode(tokenizer))
    said = refusal(f"draft:{tmp_path}")
    assert str(tmp_path) in said and "quickstart" in said and repr(first) in said and repr(second) in said


@pytest.mark.parametrize(
    ("speculate", "words"),
    [
        ("draft", "give draft:MODEL"),
        ("draft:", "give draft:MODEL"),
        ("draft:no/such/folder", "is not a folder"),
        ("mtp", "LlamaForCausalLM"),
        ("mtp", "there are ngram, suffix, auto, draft:MODEL, eagle:HEAD and medusa:HEADS"),
        ("trees", "no such proposer; there are auto, draft:MODEL, eagle:HEAD, medusa:HEADS, mtp"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(speculate, words):
    assert words in refusal(speculate)


def test_heads_that_nobody_reads_are_named(folder, tmp_path):
    make_checkpoint("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_bytes(msgspec.json.encode(msgspec.json.decode(config.read_bytes()) | {"num_nextn_predict_layers": 1}))
    said = refusal("mtp", model=str(tmp_path), skip_tokenizer=True)
    assert "not implemented for LlamaForCausalLM" in said and "num_nextn_predict_layers 1" in said


def test_more_drafts_than_there_may_be_are_refused():
    with pytest.raises(ConfigError, match="max_drafts is 65; expected 64 or less"):
        EngineConfig(max_drafts=65)


def test_a_device_with_one_program_refuses_a_second_model():
    said = refusal(f"draft:{QUICKSTART}", Unsupported, device="fake-static")
    assert "fake-static" in said and "ngram, suffix and auto" in said


def test_a_draft_model_that_keeps_states_is_refused(folder, tmp_path):
    make_toy("toy-state", tmp_path)
    model = str(checkpoint(folder, "llama"))
    said = refusal(f"draft:{tmp_path}", Unsupported, model=model, skip_tokenizer=True)
    assert "draft model: a layer that keeps no page by token (StateSpec)" in said
