"""What a checkpoint serves, from its files alone; what is not understood is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anychip.config import EngineConfig
from anychip.errors import AnychipError
from anychip.model_config import load_model_config
from anychip.tasks.detect import resolved, served_task
from anychip.tasks.served import ServedTask

SIZES = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 130,
}  # fmt: skip
PACKAGE = "sentence_transformers.models"
PARTS = ("Transformer", "Pooling", "Normalize")


def folder_of(tmp_path: Path, architecture: str, **fields: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], **SIZES, **fields}))
    return tmp_path


def with_modules(folder: Path, *kinds: str, **files: Any) -> Path:
    """`files` by name without .json, with "/" as "__"; a pooling over all tokens where none is given."""
    modules = [
        {"idx": at, "name": str(at), "path": f"{at}_{kind.rpartition('.')[2]}" if at else "", "type": kind}
        for at, kind in enumerate(kind if "." in kind else f"{PACKAGE}.{kind}" for kind in kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name, content in {"1_Pooling__config": {"pooling_mode_mean_tokens": True}, **files}.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def served(folder: Path, **config: Any) -> ServedTask:
    given = EngineConfig(model=str(folder), **config)
    return served_task(given, load_model_config(str(folder)))


def refused(folder: Path, **config: Any) -> str:
    with pytest.raises(AnychipError) as error:
        served(folder, **config)
    return str(error.value)


@pytest.mark.parametrize(
    ("architecture", "fields", "task"),
    [
        ("LlamaForCausalLM", {}, "generate"),
        ("FalconForCausalLM", {}, "generate"),
        ("BertForSequenceClassification", {"id2label": {"0": "fit"}}, "score"),
        ("BertForSequenceClassification", {}, "classify"),
        ("XLMRobertaForSequenceClassification", {"num_labels": 1}, "score"),
        ("Qwen3ForSequenceClassification", {"num_labels": 1}, "classify"),
    ],
)
def test_architectures_have_tasks(tmp_path, architecture, fields, task):
    assert served(folder_of(tmp_path, architecture, **fields)).task == task


def test_modules_json_makes_any_body_an_embedder(tmp_path):
    for architecture in ("BertModel", "MPNetForMaskedLM", "Qwen3ForCausalLM", "MistralModel"):
        found = served(with_modules(folder_of(tmp_path, architecture), *PARTS))
        assert (found.task, found.pooling, found.normalize, found.size) == ("embed", "mean", True, 32)


def test_the_operators_word_goes_before_the_files(tmp_path):
    folder = with_modules(folder_of(tmp_path, "Qwen3ForCausalLM"), *PARTS)
    assert served(folder, task="generate").task == "generate"
    assert served(folder, vector_pooling="last").pooling == "last"
    assert served(folder, vector_dimensions=(8, 16)).dimensions == (8, 16)
    classifier = folder_of(tmp_path, "Qwen3ForSequenceClassification", num_labels=1)
    (folder / "modules.json").unlink()
    assert served(classifier, task="reward").activation == "identity"


def test_settings_of_sentence_transformers_are_read(tmp_path):
    folder = with_modules(
        folder_of(tmp_path, "RobertaModel", matryoshka_dimensions=[8, 16]),
        *PARTS,
        **{"1_Pooling__config": {"pooling_mode": "lasttoken", "embedding_dimension": 32, "include_prompt": True}},
        config_sentence_transformers={"prompts": {"query": "q: "}, "default_prompt_name": "query"},
        sentence_bert_config={"max_seq_length": 20, "do_lower_case": True, "transformer_task": "feature-extraction"},
    )
    found = served(folder)
    assert (found.pooling, found.prompts, found.default_prompt) == ("last", {"query": "q: "}, "query")
    assert (found.max_length, found.lower_case, found.dimensions) == (20, True, (8, 16))
    config, model = EngineConfig(model=str(folder)), load_model_config(str(folder))
    assert model.max_positions == 128, "RoBERTa's first two positions are no token's"
    ready = resolved(config, model, found)
    assert (ready.task, ready.pooling, ready.max_model_len) == ("embed", True, 20)


@pytest.mark.parametrize(
    ("kinds", "files", "said"),
    [
        ((*PARTS[:1], "Pooling", "WordWeights"), {}, "module WordWeights is not understood"),
        (("Transformer", "custom_code.Pooling"), {}, "custom_code.Pooling, which is code of its own"),
        (("StaticEmbedding", "Pooling"), {}, "first module StaticEmbedding"),
        (("Transformer",), {}, "no module Pooling"),
        (("Transformer", "Pooling", "Normalize", "LayerNorm"), {}, "module LayerNorm behind Normalize"),
        (PARTS, {"1_Pooling__config": {"pooling_mode_max_tokens": True}}, "pooling max"),
        (PARTS, {"1_Pooling__config": {"pooling_mode": ["cls", "mean"]}}, "pooling cls + mean"),
        (PARTS, {"1_Pooling__config": {"pooling_mode": "cls", "include_prompt": False}}, "include_prompt false"),
        (PARTS, {"sentence_bert_config": {"max_seq_length": 9, "magic": 1}}, "magic is not understood"),
        (PARTS, {"sentence_bert_config": {"modality_config": {"image": {}}}}, "modalities image"),
        (PARTS, {"config_sentence_transformers": {"model_type": "SparseEncoder"}}, "model_type 'SparseEncoder'"),
        (PARTS, {"config_sentence_transformers": {"prompts": [1]}}, "prompts"),
        ((*PARTS[:2], "Dense"), {"2_Dense__config": {"activation_function": "os.system"}}, "activation_function os"),
        ((*PARTS[:2], "Dense"), {"2_Dense__config": {"in_features": 32}}, "pickles"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, kinds, files, said):
    assert said in refused(with_modules(folder_of(tmp_path, "BertModel"), *kinds, **files))


@pytest.mark.parametrize(
    ("architecture", "fields", "config", "said"),
    [
        ("BertModel", {}, {}, "--vector-pooling cls, mean or last"),
        ("BertForMaskedLM", {}, {}, "--vector-pooling"),
        ("BertModel", {}, {"task": "generate"}, "is an encoder and draws no text"),
        ("BertModel", {}, {"task": "classify"}, "--task classify takes a classifier"),
        ("LlamaForCausalLM", {}, {"task": "embed"}, "--vector-pooling"),
        ("LlamaForCausalLM", {}, {"task": "score"}, "no tokens yes and no"),
        ("BertForTokenClassification", {}, {}, "no task of it is served"),
        ("BertForSequenceClassification", {}, {"task": "score"}, "the checkpoint has 2"),
        ("Qwen3ForSequenceClassification", {"num_labels": 1}, {"task": "score"}, "how a pair becomes a prompt"),
        ("Qwen3Model", {"use_bidirectional_attention": True}, {}, "tokens see those behind them"),
        ("RobertaForSequenceClassification", {"problem_type": "x"}, {}, "problem_type 'x'"),
        (
            "RobertaForSequenceClassification",
            {"sbert_ce_default_activation_function": "my.Activation"},
            {},
            "activation my.Activation",
        ),
    ],
)
def test_no_task_is_guessed(tmp_path, architecture, fields, config, said):
    assert said in refused(folder_of(tmp_path, architecture, **fields), **config)


@pytest.mark.parametrize("config", [{"vector_pooling": "last"}, {"vector_dimensions": (8,)}])
def test_settings_of_vectors_are_refused_where_text_is_served(tmp_path, config):
    folder = folder_of(tmp_path, "LlamaForCausalLM")
    given, model = EngineConfig(model=str(folder), **config), load_model_config(str(folder))
    with pytest.raises(AnychipError, match="is for vectors, and this serves text; give task embed, or leave it out"):
        resolved(given, model, served_task(given, model))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"max_num_batched_tokens": 64}, "max_num_batched_tokens is 64, and a text may have 130"),
        ({"speculate": "ngram"}, "--speculate drafts text"),
    ],
)
def test_settings_that_an_encoder_cannot_have_are_refused(tmp_path, config, said):
    folder = with_modules(folder_of(tmp_path, "BertModel"), *PARTS)
    given, model = EngineConfig(model=str(folder), **config), load_model_config(str(folder))
    with pytest.raises(AnychipError, match=said):
        resolved(given, model, served_task(given, model))
