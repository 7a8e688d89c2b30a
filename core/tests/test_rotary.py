"""Rotary tables equal transformers' for every scaling that is known."""

from __future__ import annotations

import msgspec
import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from anychip.layers.rotary import make_rope
from anychip.model_config import ModelConfig, load_model_config, rope_parameters

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "num_hidden_layers": 1, "vocab_size": 64}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn, fractional bounds": {**YARN, "truncate": False},
    "yarn, its own betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, weighed amplitudes": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, a given amplitude": {**YARN, "attention_factor": 1.3},
}  # fmt: skip


def saved(config, tmp_path, architecture: str) -> ModelConfig:
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    return load_model_config(str(tmp_path))


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaling_is_the_librarys(name, tmp_path):
    parameters = {**SCALINGS[name], "rope_theta": 10000.0}
    theirs = LlamaConfig(**SIZES, max_position_embeddings=512, rope_parameters=parameters)
    frequencies, amplitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, device="cpu")
    config = saved(theirs, tmp_path, "LlamaForCausalLM")
    rope = make_rope(config, rope_parameters(config), "cpu")
    angles = torch.outer(torch.arange(512).float(), frequencies)
    torch.testing.assert_close(rope.cos, angles.cos() * amplitude, rtol=0, atol=1e-5)
    torch.testing.assert_close(rope.sin, angles.sin() * amplitude, rtol=0, atol=1e-5)


@pytest.mark.parametrize("served", [128, 512, 1024])
def test_dynamic_frequencies_are_the_librarys_for_a_request_of_the_served_length(served, tmp_path):
    parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    theirs = LlamaConfig(**SIZES, max_position_embeddings=512, rope_parameters=parameters)
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, device="cpu", seq_len=served)
    config = saved(theirs, tmp_path, "LlamaForCausalLM")
    assert config.most_positions == 2048
    rope = make_rope(msgspec.structs.replace(config, max_positions=served), rope_parameters(config), "cpu")
    angles = torch.outer(torch.arange(served).float(), frequencies)
    torch.testing.assert_close(rope.cos, angles.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(rope.sin, angles.sin(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("served", [128, 512])
def test_longrope_takes_its_factors_from_the_length_that_is_served(served, tmp_path):
    """Within the original length the short ones, as the library does for short requests; beyond it the long ones."""
    parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 10 for i in range(16)],
        "long_factor": [2.0 + i for i in range(16)],
    }  # fmt: skip
    settings = {"max_position_embeddings": 512, "original_max_position_embeddings": 128, "pad_token_id": 0}
    theirs = Phi3Config(**SIZES, **settings, rope_parameters=parameters)
    module = Phi3RotaryEmbedding(theirs)
    positions = torch.arange(served).unsqueeze(0)
    cos, sin = module(torch.zeros(1, served, 1), positions)
    config = saved(theirs, tmp_path, "Phi3ForCausalLM")
    rope = make_rope(msgspec.structs.replace(config, max_positions=served), rope_parameters(config), "cpu")
    torch.testing.assert_close(rope.cos, cos[0, :, :16], rtol=0, atol=1e-5)
    torch.testing.assert_close(rope.sin, sin[0, :, :16], rtol=0, atol=1e-5)
