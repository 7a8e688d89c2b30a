"""What published checkpoints of hybrids write otherwise than the library does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anychip.errors import Unsupported
from anychip.model_config import ModelConfig, load_model_config
from anychip.models.hybrid import ATTENTION, STATE
from anychip.models.kimi_linear import KimiLinear
from anychip.models.nemotron_h import EXPERTS, FEED_FORWARD, NemotronH
from anychip.models.zamba2 import HYBRID, Zamba2

COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}


def config_of(folder: Path, architecture: str, **fields: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], **COMMON, **fields}))
    return load_model_config(str(folder))


def test_kimi_linears_layers_of_attention_are_listed_from_one(tmp_path):
    listed = {"full_attn_layers": [4], "kda_layers": [1, 2, 3, 5], "num_heads": 2, "head_dim": 32}
    listed["short_conv_kernel_size"] = 3
    fields = {"model_max_length": 99, "num_experts": 8, "num_experts_per_token": 2, "moe_renormalize": False}
    config = config_of(tmp_path, "KimiLinearForCausalLM", linear_attn_config=listed, **fields)
    assert KimiLinear.kinds(config) == [STATE, STATE, STATE, ATTENTION, STATE]
    sizes = KimiLinear.sizes(config)
    assert (sizes.heads, sizes.head_dim, sizes.width) == (2, 32, 3)
    assert (config.max_positions, config.get("num_local_experts"), config.get("norm_topk_prob")) == (99, 8, False)


@pytest.mark.parametrize(
    ("published", "wanted"),
    [
        ("model.layers.1.block_sparse_moe.experts.17.w1.weight", "model.layers.1.mlp.experts.17.gate_proj.weight"),
        ("model.layers.1.block_sparse_moe.experts.17.w2.weight", "model.layers.1.mlp.experts.17.down_proj.weight"),
        ("model.layers.1.block_sparse_moe.experts.3.w3.weight", "model.layers.1.mlp.experts.3.up_proj.weight"),
        ("model.layers.1.block_sparse_moe.gate.weight", "model.layers.1.mlp.gate.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_kimi_linears_experts_are_found_under_deepseeks_names(published, wanted):
    assert KimiLinear.wanted_name(published) == wanted


def test_nemotron_hs_pattern_has_a_letter_for_experts(tmp_path):
    config = config_of(tmp_path, "NemotronHForCausalLM", hybrid_override_pattern="ME*M-", max_position_embeddings=512)
    assert NemotronH.kinds(config) == [STATE, EXPERTS, ATTENTION, STATE, FEED_FORWARD]
    with pytest.raises(Unsupported, match=r"hybrid_override_pattern has X; known are M, \*, - and E"):
        NemotronH.kinds(
            config_of(tmp_path, "NemotronHForCausalLM", hybrid_override_pattern="MEX", max_position_embeddings=512)
        )


def test_zamba2s_layers_have_the_words_of_older_checkpoints_too(tmp_path):
    kinds = ["mamba", "hybrid", "mamba", "mamba", "hybrid"]
    config = config_of(tmp_path, "Zamba2ForCausalLM", layers_block_type=kinds)
    assert Zamba2.kinds(config) == [STATE, HYBRID, STATE, STATE, HYBRID]
    assert Zamba2.head_dim(config) == 32, "attention reads a state of twice the width"
