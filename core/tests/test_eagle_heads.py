"""Heads draft what their loop in plain torch says of the same text, however the engine is run; texts stay the target's.

One page may differ from that loop: a block's last one, where texts that share the block go on with different tokens
(docs/decisions/0051). No texts here do; those of test_speculated_product.py do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from followed_drafts import MAX_DRAFTS, followed, texts
from heads_kit import PlainHead, medusa_drafts, write_eagle1, write_eagle3, write_medusa
from transformers import AutoModelForCausalLM

from anychip import LLM, SamplingParams
from anychip.config import EngineConfig
from anychip.errors import CheckpointError, ConfigError, Unsupported
from anychip.head_config import load_head_config
from anychip.launch.plan import plan_engine
from anychip.model_config import load_model_config
from anychip.types import QUICKSTART
from anychip_conformance.equality import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import Case, open_llm

LAYERS = (0, 1, 2)
"""Not the last: transformers shows its hidden states behind the final norm."""
WRITERS: dict[str, Callable[..., Any]] = {
    "eagle3": lambda folder: write_eagle3(folder, layers=LAYERS),
    "eagle3-own-embedding": lambda folder: write_eagle3(
        folder, layers=LAYERS, own_embedding=True, written_as="layers.0"
    ),
    "eagle1": write_eagle1,
    "eagle1-two-layers": lambda folder: write_eagle1(folder, num_layers=2, bias=True),
    "medusa": write_medusa,
    "medusa-targets-output": lambda folder: write_medusa(folder, own_outputs=False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def checkpoint(folder: Path, family: str) -> Path:
    if not (folder / family).exists():
        make_checkpoint(family, folder / family)
    return folder / family


class Reference:
    """The target in transformers' code, and the head in plain torch."""

    def __init__(self, target: Path, head: Path, kind: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        self.weights = WRITERS[kind](head)
        self.output = self.model.get_output_embeddings().weight
        self.is_medusa = kind.startswith("medusa")
        self.head = PlainHead(self.weights, self.model.get_input_embeddings().weight, self.output)

    @torch.inference_mode()
    def drafts(self, ids: list[int], count: int) -> list[int]:
        states = self.model(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
        if self.is_medusa:
            return medusa_drafts(self.weights, states[-1][0, -1], self.output, count)
        taps = [states[layer + 1] for layer in LAYERS] if self.head.is_eagle3 else [states[-1]]
        return self.head.drafts(ids, [each[0] for each in taps], count)


def speculate(kind: str, head: Path) -> str:
    return f"{'medusa' if kind.startswith('medusa') else 'eagle'}:{head}"


PREEMPTED = Case("llama", budget=24, prefix_caching=True, preemption=True, overlap=True, device="cpu")
IN_ORDER = Case("qwen3", budget=64, prefix_caching=True, preemption=False, overlap=False, device="cpu")
TWO_GROUPS = Case("gemma3", budget=24, prefix_caching=True, preemption=True, overlap=True, device="cpu")
LONG_BLOCKS = Case("llama", budget=24, prefix_caching=True, preemption=False, overlap=True, device="fake-hostlen")
TWO_RANKS = Case("llama", budget=64, prefix_caching=False, preemption=True, overlap=True, device="cpu-tp2")
FULL = pytest.mark.full
WAYS = [
    pytest.param("eagle3", PREEMPTED, 1.0),
    pytest.param("eagle1-two-layers", IN_ORDER, 0.3),
    pytest.param("eagle3-own-embedding", PREEMPTED, 0.3, marks=FULL),
    pytest.param("eagle1", TWO_GROUPS, 1.0, marks=FULL),
    pytest.param("eagle3", TWO_GROUPS, 0.3, marks=FULL),
    pytest.param("eagle3", LONG_BLOCKS, 1.0, marks=FULL),
    pytest.param("eagle1", TWO_RANKS, 1.0, marks=FULL),
    pytest.param("eagle3", TWO_RANKS, 0.3, marks=FULL),
    pytest.param("medusa", PREEMPTED, 0.5),
    pytest.param("medusa-targets-output", IN_ORDER, 1.0, marks=FULL),
    pytest.param("medusa", LONG_BLOCKS, 0.5, marks=FULL),
    pytest.param("medusa-targets-output", TWO_RANKS, 0.5, marks=FULL),
]


@pytest.mark.parametrize(("kind", "case", "how_often"), WAYS, ids=str)
def test_drafts_are_what_the_head_says_of_the_text_by_itself(kind, case, how_often, folder, monkeypatch):
    target = checkpoint(folder, case.family)
    reference = Reference(target, folder / kind, kind)
    drafted = followed(monkeypatch, case, target, speculate(kind, folder / kind), how_often)
    assert [ids for _, ids in drafted] == [reference.drafts(text, len(ids)) for text, ids in drafted]


def test_passes_of_a_token_a_row_replay_graphs(folder, tmp_path):
    """On a device that captures whole steps: the target's with taps, the head's with features."""
    write_eagle1(tmp_path / "head")
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    ran = list[tuple[tuple[str, ...], bool]]()

    def watch(program: Any) -> None:
        get = program._steps.get

        def watched(key):
            captured = get(key)
            if key.max_query_len == 1:
                ran.append((key.features, captured is not None))
            return captured

        program._steps.get = watched

    with open_llm(
        LONG_BLOCKS, checkpoint(folder, "llama"), speculate=f"eagle:{tmp_path / 'head'}", max_drafts=MAX_DRAFTS
    ) as llm:
        llm.engine.scheduler.drafting.measured_costs_are_ignored()
        worker = llm.engine.executor.worker
        watch(worker.program)
        watch(worker.drafter.runner.program)
        llm.generate(texts()[:3], sampling)
    assert {features for features, _ in ran} >= {("taps", "embeddings")}
    assert all(captured for _, captured in ran), ran


# -- memory -------------------------------------------------------------------------------------------------


def test_memory_is_counted_and_predicted(folder):
    model, head = str(checkpoint(folder, "llama")), folder / "counted"
    weights = write_eagle3(head)
    given = {
        "device": "cpu", "skip_tokenizer": True, "max_model_len": 160, "kv_cache_bytes": 1 << 20, "dtype": "float32",
        "max_num_seqs": 64, "max_num_batched_tokens": 256,
    }  # fmt: skip
    planned = plan_engine(EngineConfig(model=model, **given, speculate=f"eagle:{head}")).worker.memory
    with LLM(model, **given) as llm:
        alone = llm.worker.memory
    with LLM(model, **given, speculate=f"eagle:{head}") as llm:
        memory = llm.worker.memory
    features = 4 * HIDDEN_SIZE * (3 * 256 + 64)  # of the steps in flight and the one behind them, and of guesses
    assert memory.activations - alone.activations >= features
    own = sum(each.nbytes for name, each in weights.items() if name != "t2d")
    assert memory.weights == planned.weights
    assert own <= memory.weights - alone.weights < own + 4 * HIDDEN_SIZE * VOCAB_SIZE, "the embedding is the target's"
    # A block of the target has as many pages as the target has layers, and the head adds one.
    assert memory.num_blocks == alone.num_blocks * NUM_LAYERS // (NUM_LAYERS + 1) == planned.num_blocks


# -- what is refused ----------------------------------------------------------------------------------------


def refusal(
    folder: Path,
    head: str | Path,
    error: type[Exception] = ConfigError,
    *,
    kind: str = "eagle",
    family: str = "llama",
    **settings: Any,
) -> str:
    given = {"device": "cpu", "max_model_len": 64, "num_kv_blocks": 32, "skip_tokenizer": True, **settings}
    with pytest.raises(error) as raised:
        LLM(str(checkpoint(folder, family)), speculate=f"{kind}:{head}", **given)
    return str(raised.value)


CHANGED = {
    "another hidden size": ({"hidden_size": 32}, ["hidden states of 32 elements", f"has {HIDDEN_SIZE}"]),
    "another target's hidden size": ({"target_hidden_size": 96}, ["hidden states of 96 elements"]),
    "another vocabulary": ({"vocab_size": 600}, ["vocabulary of 600 tokens", f"has {VOCAB_SIZE}"]),
    "more layers than the target": (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 7]}},
        ["behind layers [1, 2, 7]", f"layers 0 to {NUM_LAYERS - 1}"],
    ),
    "the embedding": ({"eagle_config": None, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]}, ["behind layers [-1, 0"]),
    "layers that are none": (
        {"eagle_aux_hidden_state_layer_ids": "all", "eagle_config": None},
        ["'all', expected a list of layers"],
    ),
    "another architecture": ({"architectures": ["MLPSpeculator"]}, ["MLPSpeculator", "LlamaForCausalLMEagle3"]),
    "another layout": ({"norm_before_residual": True}, ["norm_before_residual, a layout that is not implemented"]),
    "two layers": ({"num_hidden_layers": 2}, ["has 2 layers, and an EAGLE-3 head has one"]),
}


@pytest.mark.parametrize("what", list(CHANGED))
def test_a_head_for_another_model_is_refused_with_both_named(what, folder, tmp_path):
    changes, words = CHANGED[what]
    write_eagle3(tmp_path / "head", **changes)
    said = refusal(folder, tmp_path / "head")
    assert str(tmp_path / "head") in said and all(each in said for each in words), said


LAYERS_READ = {
    "by default what goes into 2, n / 2 and n - 3": ({"layers": None}, (1, 15, 28)),
    "what comes out of layers": ({"layers": (4, 9, 30)}, (4, 9, 30)),
    "what goes into layers": ({"layers": None, "eagle_aux_hidden_state_layer_ids": [2, 18, 29]}, (1, 17, 28)),
}


@pytest.mark.parametrize("what", list(LAYERS_READ))
def test_a_head_reads_the_layers_that_its_training_framework_means(what, folder, tmp_path):
    settings, expected = LAYERS_READ[what]
    write_eagle3(tmp_path / "head", **settings)
    target = msgspec.structs.replace(load_model_config(str(checkpoint(folder, "llama"))), num_layers=32)
    assert load_head_config(str(tmp_path / "head"), target).taps == expected


def test_what_is_no_head_is_refused(folder, tmp_path):
    assert "give eagle:HEAD" in refusal(folder, "")
    assert "is no EAGLE-1 head: it has no tensor fc.weight" in refusal(folder, checkpoint(folder, "llama"))
    assert "hidden states of 384 elements" in refusal(folder, QUICKSTART)
    write_eagle3(tmp_path / "lacking", lacks="midlayer.hidden_norm.weight")
    assert "lacks tensor 'midlayer.hidden_norm.weight'" in refusal(folder, tmp_path / "lacking", CheckpointError)
    write_eagle3(tmp_path / "far", first_token=VOCAB_SIZE)
    assert "the vocabulary has 512" in refusal(folder, tmp_path / "far", CheckpointError)


MEDUSA = {
    "another hidden size": ({"hidden_size": 32}, ["hidden states of 32 elements", f"has {HIDDEN_SIZE}"]),
    "another vocabulary": ({"vocab_size": 600}, ["vocabulary of 600 tokens", f"has {VOCAB_SIZE}"]),
    "another architecture": ({"architectures": ["MLPSpeculator"]}, ["MLPSpeculator", "there is MedusaModel"]),
    "fewer heads than drafts": ({"num_heads": 2}, ["has 2 heads", "give --max-drafts 2"]),
    "no heads": ({"num_heads": 0}, ["has 0 heads; expected 1 or more"]),
}


@pytest.mark.parametrize("what", list(MEDUSA))
def test_medusa_heads_for_another_model_are_refused(what, folder, tmp_path):
    changes, words = MEDUSA[what]
    write_medusa(tmp_path / "heads", **changes)
    said = refusal(folder, tmp_path / "heads", kind="medusa", max_drafts=3)
    assert str(tmp_path / "heads") in said and all(each in said for each in words), said


def test_a_device_with_one_program_refuses_a_head(folder, tmp_path):
    write_eagle1(tmp_path / "head")
    said = refusal(folder, tmp_path / "head", Unsupported, device="fake-static")
    assert "fake-static" in said and "a head that drafts" in said and "ngram, suffix and auto" in said


def test_a_model_in_transformers_code_has_no_head(folder, tmp_path):
    write_eagle1(tmp_path / "head")
    assert "heads need a model of a native family" in refusal(folder, tmp_path / "head", family="olmo2")


def test_taps_are_shown_or_read_by_a_head(folder, tmp_path):
    write_eagle1(tmp_path / "head")
    assert "give taps (1,) or --speculate eagle, not both" in refusal(folder, tmp_path / "head", taps=(1,))
