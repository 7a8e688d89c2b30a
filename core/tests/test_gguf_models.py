"""A GGUF file gives the tokens that the checkpoint gives which it was made from."""

from __future__ import annotations

import pytest
from gguf_files import convert, plain, write_gguf
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

from anychip_conformance.equality.tiny_models import _COMMON, make_checkpoint
from anychip_conformance.equality.workload import Case, generate, open_llm


def saved(model, folder):
    model.eval().save_pretrained(folder)
    return model


def gemma3(folder):
    """With the windows that a file implies: five windowed layers, and a full one."""
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    }
    settings = {**_COMMON, "num_hidden_layers": 6, "sliding_window": 32, "query_pre_attn_scalar": 24}
    return saved(Gemma3ForCausalLM(Gemma3TextConfig(**settings, rope_parameters=ropes)), folder)


def qwen2(folder):
    return saved(Qwen2ForCausalLM(Qwen2Config(**_COMMON, tie_word_embeddings=True)), folder)


MAKERS = {
    **{
        family: lambda folder, family=family: make_checkpoint(family, folder)
        for family in ("llama", "mixtral", "qwen3", "qwen3-moe", "gemma2", "phi3", "granite", "gpt-oss")
    },
    "gemma3": gemma3,
    "qwen2": qwen2,
}


@pytest.mark.parametrize("family", MAKERS)
def test_a_file_gives_the_tokens_of_its_checkpoint(family, tmp_path):
    metadata, tensors = convert(family, MAKERS[family](tmp_path))
    file = write_gguf(tmp_path / "model.gguf", metadata, plain(tensors))
    answers = []
    for path in (tmp_path, file):
        with open_llm(Case("llama", 64, True, False, True, "cpu"), path) as llm:
            answers.append([list(each) for each in generate(llm)])
    assert answers[1] == answers[0]
