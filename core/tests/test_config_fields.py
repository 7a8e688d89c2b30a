"""Every field of config.json means what it means to transformers' class of that family, or is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from anychip import LLM, SamplingParams
from anychip.errors import AnychipError
from anychip_conformance.equality.oracle import greedy, judge
from anychip_conformance.equality.tiny_models import FAMILIES, make_checkpoint

NUM_TOKENS = 8
PROMPT = [3 + (i * 37) % 500 for i in range(40)]
"""Longer than the windows."""

ALTERNATING = ["full_attention", "sliding_attention"] * 2
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
VALUES: dict[str, list[Any]] = {
    "attention_bias": [True, False],
    "attention_multiplier": [0.5],
    "attn_logit_softcapping": [1.0, None],
    "decoder_sparse_step": [2],
    "clip_qkv": [0.5],
    "embedding_multiplier": [3.0],
    "final_logit_softcapping": [2.0, None],
    "first_k_dense_replace": [2, None],
    "head_dim": [32, None],
    "hidden_act": ["gelu", "gelu_pytorch_tanh", "relu", "swish"],
    "hidden_activation": ["gelu", "silu", None],
    "intermediate_size": [96],
    "kv_lora_rank": [24],
    "layer_types": [ALTERNATING, ["full_attention"] * 4, ["chunked_attention"] * 4, ["full_attention"], None],
    "logits_scaling": [2.0],
    "max_position_embeddings": [256],
    "max_window_layers": [1],
    "mlp_bias": [True],
    "mlp_only_layers": [[0], None],
    "moe_intermediate_size": [64],
    "n_group": [1],
    "n_shared_experts": [3],
    "norm_topk_prob": [True, False],
    "num_experts": [4],
    "num_experts_per_tok": [1],
    "num_key_value_heads": [4, 1, None],
    "num_local_experts": [2],
    "original_max_position_embeddings": [128],
    "partial_rotary_factor": [0.5],
    "q_lora_rank": [16, None],
    "qk_nope_head_dim": [8],
    "qk_rope_head_dim": [16],
    "qkv_bias": [False],
    "query_pre_attn_scalar": [100],
    "residual_multiplier": [0.5],
    "rms_norm_eps": [0.5],
    "rope_interleave": [False],
    "rotary_dim": [16],
    "routed_scaling_factor": [0.5],
    "rope_local_base_freq": [50.0],
    "rope_parameters": [
        {"partial_rotary_factor": 0.5},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5},
        {"rope_type": "default", "rope_theta": 50.0},
        {"rope_type": "dynamic", "factor": 4.0},
        YARN,
        {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}},
        None,
    ],
    "rope_scaling": [{"type": "linear", "factor": 4.0}, YARN, {"type": "dynamic", "factor": 4.0}],
    "rope_theta": [50.0],
    "shared_expert_intermediate_size": [32],
    "sliding_window": [4, None],
    "sliding_window_pattern": [2],
    "swiglu_alpha": [1.0],
    "swiglu_limit": [0.5],
    "tie_word_embeddings": [True, False],
    "topk_group": [1],
    "topk_method": ["greedy", "group_limited_greedy", "another"],
    "use_bidirectional_attention": [True],
    "use_qk_norm": [False],
    "use_sliding_window": [True, False],
    "v_head_dim": [16],
}  # fmt: skip
ALIASES = {"num_local_experts": "num_experts"}
LEFT_OUT = object()
"""A field that config.json lacks: transformers' class says what it is then."""
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
"""Without these a config.json is refused: their defaults are those of some large model."""


def cases() -> Iterator[Any]:
    for family in FAMILIES:
        for field, values in VALUES.items():
            for value in (*values, LEFT_OUT):
                if value is LEFT_OUT and field in SIZES:
                    continue
                shown = "left out" if value is LEFT_OUT else json.dumps(value).replace('"', "")
                yield pytest.param(family, field, value, id=f"{family}-{field}-{shown}")


def perturbed(model: PreTrainedModel) -> PreTrainedModel:
    """With nothing in it that is one or zero, which would hide what is left out."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("norm", "bias", "sinks")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


class Bases:
    """A config.json of each family, made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, dict[str, Any]] = {}

    def get(self, family: str) -> dict[str, Any]:
        if family not in self._made:
            make_checkpoint(family, self._folder / family)
            self._made[family] = json.loads((self._folder / family / "config.json").read_text())
        return dict(self._made[family])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def reference(folder: Path) -> PreTrainedModel:
    """transformers' model of a config.json, its weights saved beside it."""
    torch.manual_seed(7)
    config = AutoConfig.from_pretrained(folder)
    model = perturbed(AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32))
    document = (folder / "config.json").read_bytes()
    model.save_pretrained(folder)
    (folder / "config.json").write_bytes(document)
    return model


def check(family: str, field: str, value: Any, bases: Bases, folder: Path) -> None:
    config = bases.get(family)
    config.pop(field, None)
    if value is not LEFT_OUT:
        config[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model = reference(folder)
        answer = greedy(model, PROMPT, NUM_TOKENS)
    except Exception as error:  # noqa: BLE001 - whatever it is: the library itself cannot
        pytest.skip(f"transformers refuses: {error}")
    settings = {"device": "cpu", "num_kv_blocks": 64, "skip_tokenizer": True, "max_model_len": 60}
    try:
        with LLM(str(folder), **settings) as llm:
            sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
            tokens = llm.generate(PROMPT, sampling)[0].outputs[0].token_ids
    except AnychipError as refusal:
        names = ("rope", "rotary") if "rope" in field else (field, ALIASES.get(field, field))
        assert any(name in str(refusal) for name in names), f"refused without its name: {refusal}"
        return
    verdict = judge(answer, tokens)
    assert verdict.divergence is None or verdict.excused, f"{answer.tokens} {tokens}"


CASES = list(cases())


@pytest.mark.parametrize(("family", "field", "value"), CASES[:: len(CASES) // 24])
def test_a_field_is_followed_as_transformers_does_or_refused(family, field, value, bases, tmp_path):
    check(family, field, value, bases, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(("family", "field", "value"), CASES)
def test_every_field_is_followed_as_transformers_does_or_refused(family, field, value, bases, tmp_path):
    check(family, field, value, bases, tmp_path)
