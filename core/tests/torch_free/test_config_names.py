"""Fields of config.json under the names of other classes."""

from __future__ import annotations

import json

import pytest

from anychip.config_names import OTHER_NAMES, UNBOUNDED
from anychip.errors import CheckpointError
from anychip.model_config import load_model_config

GPT_2 = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 50257,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 6,
    "n_positions": 1024,
}


def loaded(tmp_path, document):
    (tmp_path / "config.json").write_text(json.dumps(document))
    return load_model_config(str(tmp_path))


def test_a_classs_own_names_are_understood(tmp_path):
    config = loaded(tmp_path, GPT_2)
    assert (config.hidden_size, config.num_heads, config.num_layers, config.max_positions) == (768, 12, 6, 1024)
    assert (config.head_dim, config.num_kv_heads) == (64, 12)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_the_common_name_counts_where_both_are_given(name, tmp_path):
    document = {**GPT_2, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "head_dim": 16}
    document |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 256}
    config = loaded(tmp_path, {**document, **dict.fromkeys(OTHER_NAMES[name], 999)})
    assert (config.hidden_size, config.num_heads, config.num_layers, config.head_dim) == (64, 4, 2, 16)
    assert (config.num_kv_heads, config.max_positions, config.vocab_size) == (2, 128, 256)


def test_a_class_without_a_number_of_positions_has_some(tmp_path):
    bloom = {name: value for name, value in GPT_2.items() if name != "n_positions"}
    assert loaded(tmp_path, {**bloom, "architectures": ["BloomForCausalLM"]}).max_positions == UNBOUNDED


def test_a_native_family_is_told_by_its_own_names(tmp_path):
    """They are the common ones: another name is another model's."""
    with pytest.raises(CheckpointError, match="has no 'num_attention_heads'"):
        loaded(tmp_path, {**GPT_2, "architectures": ["LlamaForCausalLM"]})


def test_values_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds a value that cannot be"):
        loaded(tmp_path, {**GPT_2, "n_head": 0})


def test_sizes_by_layer_count_by_the_largest(tmp_path):
    assert loaded(tmp_path, {**GPT_2, "intermediate_size": [96, 128]}).intermediate_size == 128
