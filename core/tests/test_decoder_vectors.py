"""Decoders that give vectors, labels and rewards are as transformers' classes, and as their files say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from encoders_kit import describe_modules, hidden_states, ids_of, logits_of, make_tokenizer, text_of
from safetensors.torch import load_file, save_file

from anychip import LLM
from anychip.errors import InvalidRequest

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
TEXTS = [text_of(length, seed) for seed, length in enumerate((1, 30, 7, 100))]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def make_decoder(family: str, kind: str, folder: Path, **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more})
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return model


def opened(folder: Path, **more: object) -> LLM:
    return LLM(str(folder), **{"device": "cpu", "dtype": "float32", "max_num_seqs": 4, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("saved_as", ["Qwen3ForCausalLM", "Qwen3Model"])
def test_an_embedder_needs_no_output_head_and_shares_prefixes(saved_as: str, tmp_path: Path) -> None:
    model = make_decoder("Qwen3", "Model", tmp_path, tie_word_embeddings=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [saved_as]}))
    describe_modules(tmp_path, "lasttoken", prompts={"query": "w1 w2 w3 "})
    with opened(tmp_path, max_num_batched_tokens=48) as llm:  # prompts are computed in parts
        assert (llm.served.task, llm.served.pooling) == ("embed", "last")
        plain = llm.embed(TEXTS)
        again = llm.embed(TEXTS)
        asked = llm.embed(TEXTS, prompt_name="query")
        assert llm.engine.scheduler.prefix_hits > 0
        with pytest.raises(InvalidRequest, match="this server's task is embed"):
            llm.generate("w1")
    for text, first, second, third in zip(TEXTS, plain, again, asked, strict=True):
        state = hidden_states(model, ids_of(text))[-1]
        np.testing.assert_allclose(first, state / state.norm(), **CLOSE)
        np.testing.assert_allclose(second, first, atol=1e-6)
        state = hidden_states(model, ids_of(f"w1 w2 w3 {text}"))[-1]
        np.testing.assert_allclose(third, state / state.norm(), **CLOSE)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_rewards_and_labels_are_those_of_transformers_classifier(family: str, tmp_path: Path) -> None:
    model = make_decoder(family, "ForSequenceClassification", tmp_path, num_labels=1)
    logits = [float(logits_of(model, ids_of(text))[0]) for text in TEXTS]
    with opened(tmp_path, task="reward") as llm:
        np.testing.assert_allclose(llm.reward(TEXTS), logits, **CLOSE)
    with opened(tmp_path) as llm:
        scores = [each.scores[0] for each in llm.classify(TEXTS)]
    np.testing.assert_allclose(scores, torch.tensor(logits).sigmoid(), **CLOSE)


def test_a_head_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    make_decoder("Llama", "ForSequenceClassification", tmp_path, num_labels=3)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Exception, match="lacks tensor 'score.weight'"):
        opened(tmp_path)
