"""StarCoder2's native family gives transformers' tokens: layer norms, biases, a window, a tied head."""

from __future__ import annotations

import pytest
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from anychip_conformance.equality import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE
from anychip_conformance.equality.oracle import greedy, judge
from anychip_conformance.equality.workload import NUM_TOKENS, Case, generate, open_llm, prompts


@pytest.mark.parametrize("device", ["cpu", pytest.param("cpu-tp2", marks=pytest.mark.full)])
@pytest.mark.parametrize("bias", [True, False])
def test_greedy_tokens_equal_transformers(bias, device, tmp_path):
    config = Starcoder2Config(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, intermediate_size=128, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15, max_position_embeddings=512,
        sliding_window=24, use_bias=bias, tie_word_embeddings=bias, attn_implementation="eager",
    )  # fmt: skip
    model = Starcoder2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    with open_llm(Case("starcoder2", 64, True, False, True, device), tmp_path, model_impl="native") as llm:
        answers = list(generate(llm))
    for prompt, tokens in zip(prompts(), answers, strict=True):
        verdict = judge(greedy(model, prompt, NUM_TOKENS), tokens)
        assert verdict.divergence is None or verdict.excused, verdict
