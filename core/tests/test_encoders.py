"""Encoders give the vectors, labels and scores of transformers' classes, whoever shares their batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders_kit import (
    ENCODERS,
    describe_modules,
    hidden_states,
    ids_of,
    logits_of,
    make_encoder,
    pair_of,
    text_of,
)
from safetensors.torch import save_file

from anychip import LLM
from anychip.engine.vector_inputs import TextPair
from anychip.errors import ContextTooLong, InvalidRequest
from anychip.ops.reference import ReferenceEncoder
from anychip_cpu.encoder import SdpaEncoder

TEXTS = [text_of(length, seed) for seed, length in enumerate((1, 5, 17, 40, 5, 140, 2))]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def opened(folder: Path, **more: object) -> LLM:
    return LLM(str(folder), **{"device": "cpu", "dtype": "float32", "max_num_seqs": 8, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ENCODERS)
def test_vectors_are_those_of_transformers_model(family: str, tmp_path: Path) -> None:
    model = make_encoder(family, tmp_path)
    states = [hidden_states(model, ids_of(text)) for text in TEXTS]
    with opened(tmp_path, task="embed", vector_pooling="mean") as llm:
        found = llm.embed(TEXTS, normalize=False)
        np.testing.assert_allclose(found, [each.mean(dim=0) for each in states], **CLOSE)
        found = llm.embed(TEXTS, normalize=False, pooling="cls")
        np.testing.assert_allclose(found, [each[0] for each in states], **CLOSE)
        alone = [llm.embed(text)[0] for text in TEXTS]
        together = llm.embed([*TEXTS, *reversed(TEXTS)])
        np.testing.assert_allclose(together[: len(TEXTS)], alone, atol=1e-6)
        assert not llm.engine.has_work and llm.engine.scheduler.stats.running == 0


@pytest.mark.parametrize("family", ["MPNet", pytest.param("ModernBert", marks=pytest.mark.full)])
def test_ranks_share_an_encoder(family: str, tmp_path: Path) -> None:
    model = make_encoder(family, tmp_path)
    with opened(tmp_path, task="embed", vector_pooling="cls", tensor_parallel_size=2) as llm:
        found = llm.embed(TEXTS, normalize=False)
    np.testing.assert_allclose(found, [hidden_states(model, ids_of(text))[0] for text in TEXTS], **CLOSE)


@pytest.mark.parametrize("family", [*(name for name in ENCODERS if name != "NomicBert")])
def test_scores_of_pairs_are_those_of_transformers_classifier(family: str, tmp_path: Path) -> None:
    model = make_encoder(family, tmp_path, labels=1)
    with opened(tmp_path) as llm:
        assert llm.served.task == "score"
        scores = llm.score(TEXTS[2], TEXTS[:5])
        best = llm.rerank(TEXTS[2], TEXTS[:5], top_n=2)
    expected = []
    for text in TEXTS[:5]:
        ids, types = pair_of(TEXTS[2], text)
        expected.append(float(logits_of(model, ids, types if family == "Bert" else None).sigmoid()))
    np.testing.assert_allclose(scores, expected, **CLOSE)
    assert [each.index for each in best] == sorted(range(5), key=lambda index: -expected[index])[:2]


@pytest.mark.parametrize(
    ("problem", "activation"),
    [(None, "softmax"), ("multi_label_classification", "sigmoid"), ("regression", "identity")],
)
def test_labels_are_named_and_activated_as_config_json_says(problem: str | None, activation: str, tmp_path) -> None:
    names = {0: "bad", 1: "fair", 2: "good"}
    model = make_encoder("Roberta", tmp_path, labels=3, problem_type=problem, id2label=names)
    with opened(tmp_path) as llm:
        assert llm.served.task == "classify"
        found = llm.classify(TEXTS)
        (pair,) = llm.classify(TextPair(TEXTS[1], TEXTS[0]))
    for text, each in zip(TEXTS, found, strict=True):
        logits = logits_of(model, ids_of(text))
        expected = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "identity": logits}[activation]
        np.testing.assert_allclose(each.scores, expected, **CLOSE)
        assert each.label == names[int(logits.argmax())]
    logits = logits_of(model, pair_of(TEXTS[1], TEXTS[0])[0])
    assert pair.label == names[int(logits.argmax())]


def test_what_stands_in_modules_json_is_what_is_served(tmp_path: Path) -> None:
    model = make_encoder("Bert", tmp_path)
    describe_modules(tmp_path, "cls", prompts={"query": "w1 w2 "}, default_prompt_name="query")
    modules = json.loads((tmp_path / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (tmp_path / "modules.json").write_text(json.dumps([*modules[:2], dense, modules[2]]))
    (tmp_path / "2_Dense").mkdir()
    named = {"in_features": 32, "out_features": 12, "activation_function": "torch.nn.modules.activation.ReLU"}
    (tmp_path / "2_Dense" / "config.json").write_text(json.dumps(named))
    weight, bias = torch.randn(12, 32), torch.randn(12)
    save_file({"linear.weight": weight, "linear.bias": bias}, tmp_path / "2_Dense" / "model.safetensors")
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20, "do_lower_case": True}))
    with opened(tmp_path, vector_dimensions=(4,)) as llm:
        found = llm.embed([text.upper() for text in TEXTS], truncate=True)
        short = llm.embed(TEXTS, truncate=True, dimensions=4)
        (plain,) = llm.embed([ids_of(TEXTS[1])])
        with pytest.raises(ContextTooLong, match="the text has 144 tokens, and the model takes 20"):
            llm.embed([TEXTS[5]], prompt_name=None)
        with pytest.raises(InvalidRequest, match="prompt_name is 'document'; known are 'query'"):
            llm.embed(TEXTS, prompt_name="document")
        with pytest.raises(InvalidRequest, match="dimensions is 5; the model's vectors have 4, 12"):
            llm.embed(TEXTS, dimensions=5)

    def vector(ids: list[int]) -> np.ndarray:
        state = torch.relu(weight @ hidden_states(model, ids)[0] + bias)
        return (state / state.norm()).numpy()

    for text, each, less in zip(TEXTS, found, short, strict=True):
        ids = ids_of(f"w1 w2 {text}")
        expected = vector(ids if len(ids) <= 20 else [*ids[:19], 3])
        np.testing.assert_allclose(each, expected, **CLOSE)
        np.testing.assert_allclose(less, expected[:4] / np.linalg.norm(expected[:4]), **CLOSE)
    np.testing.assert_allclose(plain, vector(ids_of(TEXTS[1])), **CLOSE)


def test_a_prompt_of_an_encoder_is_never_cut(tmp_path: Path) -> None:
    model = make_encoder("Bert", tmp_path)
    describe_modules(tmp_path)
    with opened(tmp_path, max_model_len=42, max_num_batched_tokens=43, max_num_seqs=3) as llm:
        found = llm.embed(TEXTS[:5] * 3, normalize=False)
    expected = [hidden_states(model, ids_of(text)).mean(dim=0) for text in TEXTS[:5]] * 3
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_the_cpus_attention_is_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_encoder("MPNet", tmp_path)
    with opened(tmp_path, task="embed", vector_pooling="mean") as llm:
        found = llm.embed(TEXTS)
    monkeypatch.setattr(SdpaEncoder, "plan", ReferenceEncoder.plan)
    monkeypatch.setattr(SdpaEncoder, "attend", ReferenceEncoder.attend)
    with opened(tmp_path, task="embed", vector_pooling="mean") as llm:
        np.testing.assert_allclose(llm.embed(TEXTS), found, atol=1e-6)
