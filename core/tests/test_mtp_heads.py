"""The head that a checkpoint has for itself drafts what its loop in plain torch says; without it, nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from followed_drafts import followed
from mtp_kit import MODULE, WEIGHTS, PlainMtp, write_mtp
from safetensors.torch import load_file, save_file

from anychip import LLM, SamplingParams
from anychip.config import EngineConfig
from anychip.errors import CheckpointError, ConfigError, Unsupported
from anychip.launch.plan import plan_engine
from anychip_conformance.equality import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import Case, open_llm

FULL = pytest.mark.full


class Heads:
    """Checkpoints by family, and their loops in plain torch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._plain: dict[str, PlainMtp] = {}

    def of(self, family: str) -> tuple[Path, PlainMtp]:
        if family not in self._plain:
            self._plain[family] = write_mtp(family, self.folder / family)
        return self.folder / family, self._plain[family]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Heads:
    return Heads(tmp_path_factory.mktemp("checkpoints"))


def chunked(family: str, device: str = "cpu") -> Case:
    return Case(family, budget=24, prefix_caching=True, preemption=True, overlap=True, device=device)


def in_order(family: str, device: str = "cpu") -> Case:
    return Case(family, budget=64, prefix_caching=True, preemption=False, overlap=False, device=device)


WAYS = [
    pytest.param(chunked("glm4-moe"), 1.0),
    pytest.param(in_order("deepseek-v3"), 0.3),
    pytest.param(chunked("deepseek-v32"), 0.3, marks=FULL),
    pytest.param(in_order("glm-5"), 1.0, marks=FULL),
    pytest.param(chunked("deepseek-v3"), 1.0, marks=FULL),
    pytest.param(chunked("deepseek-v3", "cpu-tp2"), 1.0, marks=FULL),
    pytest.param(in_order("glm4-moe", "cpu-tp2"), 0.3, marks=FULL),
    pytest.param(in_order("glm4-moe", "fake-hostlen"), 1.0, marks=FULL),
]


def check(drafted: list[tuple[list[int], list[int]]], plain: PlainMtp) -> None:
    assert [ids for _, ids in drafted] == [plain.drafts(text, len(ids)) for text, ids in drafted]


@pytest.mark.parametrize(("case", "how_often"), WAYS, ids=str)
def test_drafts_are_what_the_head_says_of_the_text_by_itself(case, how_often, heads, monkeypatch):
    target, plain = heads.of(case.family)
    check(followed(monkeypatch, case, target, "mtp", how_often), plain)


@pytest.mark.full
def test_experts_of_the_head_are_spread_over_ranks_as_the_targets_are(heads, monkeypatch):
    target, plain = heads.of("glm4-moe")
    check(followed(monkeypatch, in_order("glm4-moe", "cpu-tp2"), target, "mtp", 1.0, expert_parallel=True), plain)


def test_of_several_layers_the_first_drafts(tmp_path, monkeypatch):
    plain = write_mtp("glm4-moe", tmp_path, num_heads=2, copies=False)
    check(followed(monkeypatch, in_order("glm4-moe"), tmp_path, "mtp", 1.0), plain)


# -- beside the target --------------------------------------------------------------------------------------

GIVEN: dict[str, Any] = {
    "device": "cpu", "skip_tokenizer": True, "max_model_len": 160, "kv_cache_bytes": 1 << 20, "dtype": "float32",
    "max_num_seqs": 64, "max_num_batched_tokens": 256,
}  # fmt: skip


def test_weights_are_read_with_the_setting_alone_and_counted(heads):
    folder, _ = heads.of("glm4-moe")
    own = {name: each for name, each in load_file(folder / WEIGHTS).items() if name.startswith(MODULE)}
    with LLM(str(folder), **GIVEN) as llm:
        alone, notes = llm.worker.memory, llm.worker.notes
    assert sum(f"tensors of layer {NUM_LAYERS}" in note and "--speculate mtp" in note for note in notes) == 1
    with LLM(str(folder), **GIVEN, speculate="mtp") as llm:
        memory, notes = llm.worker.memory, llm.worker.notes
    assert not any("left out" in note for note in notes)
    planned = plan_engine(EngineConfig(model=str(folder), **GIVEN, speculate="mtp")).worker.memory
    copies = ("embed_tokens.weight", "shared_head.head.weight")
    wanted = sum(each.nbytes for name, each in own.items() if not name.endswith(copies))
    assert memory.weights == planned.weights
    assert wanted <= memory.weights - alone.weights < wanted + 4 * HIDDEN_SIZE * VOCAB_SIZE, "copies are not read"
    assert memory.num_blocks == alone.num_blocks * NUM_LAYERS // (NUM_LAYERS + 1) == planned.num_blocks


def test_made_up_weights_draft(heads):
    folder, _ = heads.of("glm4-moe")
    with LLM(str(folder), **GIVEN, speculate="mtp", load_format="dummy") as llm:
        llm.engine.scheduler.drafting.measured_costs_are_ignored()
        llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
        assert llm.engine.scheduler.stats.speculation.drafted > 0


# -- what is refused ----------------------------------------------------------------------------------------


def refusal(model: Path, error: type[Exception] = ConfigError, **settings: Any) -> str:
    with pytest.raises(error) as raised:
        LLM(str(model), **{**GIVEN, "speculate": "mtp", **settings})
    return str(raised.value)


def test_a_model_without_heads_says_what_it_has(tmp_path):
    make_checkpoint("glm4-moe", tmp_path, num_nextn_predict_layers=0)
    said = refusal(tmp_path)
    assert "Glm4MoeForCausalLM" in said and f"{NUM_LAYERS} layers and none of them" in said and "eagle:HEAD" in said


def test_a_model_that_keeps_states_says_why_not(tmp_path):
    make_checkpoint("qwen3-next", tmp_path)
    assert "Qwen3NextForCausalLM have such heads" in (said := refusal(tmp_path)) and "keep states" in said


def test_a_copy_that_was_saved_without_them_is_refused(tmp_path):
    make_checkpoint("glm4-moe", tmp_path, num_nextn_predict_layers=1)
    assert f"no layers.{NUM_LAYERS}.eh_proj.weight: this copy was saved without them" in refusal(tmp_path)


@pytest.mark.parametrize("lacking", ["hnorm.weight", "self_attn.q_proj.weight"])
def test_a_head_that_lacks_a_tensor_is_refused_by_its_name(lacking, tmp_path):
    write_mtp("glm4-moe", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[f"{MODULE}.{lacking}"]
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    assert f"lacks tensor '{MODULE}.{lacking}'" in refusal(tmp_path, CheckpointError)
    with open_llm(in_order("glm4-moe"), tmp_path) as llm:  # without the setting nobody wants it
        llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=2))


def test_it_is_no_head_of_another_place(heads):
    folder, _ = heads.of("glm4-moe")
    assert "no such proposer" in refusal(folder, speculate="mtp:head")
    assert "give taps (1,) or --speculate mtp, not both" in refusal(folder, taps=(1,))
    assert "transformers' code" in refusal(folder, model_impl="transformers")
    assert "a head that drafts" in refusal(folder, Unsupported, device="fake-static")
