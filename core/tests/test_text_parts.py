"""Of a checkpoint that holds more than a text decoder, the decoder answers as transformers' whole model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from anychip import LLM, SamplingParams
from anychip.config import EngineConfig
from anychip.launch.plan import plan_engine
from anychip.model_config import load_model_config
from anychip_conformance.equality.oracle import greedy, judge
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import prompts

NUM_TOKENS = 8
VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
AXES = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
WHOLES = {
    "qwen3.5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
    "qwen3.5-moe": (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration),
}


def make_whole(family: str, folder: Path) -> PreTrainedModel:
    """The family's tiny decoder beside a vision model."""
    text = make_checkpoint(family, folder / "text").config.to_dict()
    config_class, model_class = WHOLES[family]
    torch.manual_seed(3)
    text["rope_parameters"] = AXES
    whole = model_class(config_class(text_config=text, vision_config=VISION, tie_word_embeddings=False))
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if any(word in name for word in ("norm", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    whole.config._attn_implementation = "eager"
    whole.eval().save_pretrained(folder / "whole")
    return whole


class AsDecoder:
    """A whole model where its decoder is looked for: it answers text, and its depth and width are the decoder's."""

    def __init__(self, whole: PreTrainedModel) -> None:
        self._whole = whole
        self.config = whole.config.get_text_config()

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self._whole(*args, **settings)


@pytest.mark.parametrize("family", WHOLES)
def test_the_text_decoder_of_a_whole_is_served(family, tmp_path):
    whole = make_whole(family, tmp_path)
    planned = plan_engine(EngineConfig(model=str(tmp_path / "whole"), device="cpu", dtype="float32")).worker
    assert any("images and videos are refused" in note for note in planned.notes)
    texts = [prompts()[index] for index in (3, 8, 12)]
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    settings = {"device": "cpu", "dtype": "float32", "max_model_len": 160, "skip_tokenizer": True}
    with LLM(str(tmp_path / "whole"), **settings) as llm:
        outputs = [output.outputs[0].token_ids for output in llm.generate(texts, sampling)]
    for text, tokens in zip(texts, outputs, strict=True):
        verdict = judge(greedy(AsDecoder(whole), text, NUM_TOKENS), tokens)
        assert verdict.divergence is None or verdict.excused


def test_the_decoders_own_settings_count_and_the_whole_says_whether_the_head_is_tied(tmp_path):
    document = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "hidden_size": 1,
        "tie_word_embeddings": True,
        "quantization_config": {"modules_to_not_convert": ["model.language_model.layers.0.linear_attn.in_proj_a"]},
        "text_config": {
            "vocab_size": 512,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
        },
        "vision_config": {"hidden_size": 32},
    }
    (tmp_path / "config.json").write_text(json.dumps(document))
    config = load_model_config(str(tmp_path))
    assert (config.architecture, config.part_of) == ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration")
    assert (config.hidden_size, config.tie_word_embeddings) == (64, True)
    assert config.get("quantization_config") == {"modules_to_not_convert": ["model.layers.0.linear_attn.in_proj_a"]}
