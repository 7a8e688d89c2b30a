"""Decoders that give vectors, labels and rewards are as transformers' classes, and as their files say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from encoders_kit import describe_modules, hidden_states, ids_of, logits_of, make_tokenizer, text_of
from safetensors.torch import load_file, save_file

from anychip import LLM
from anychip.errors import InvalidRequest, Unsupported

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


def test_a_gemma_whose_tokens_all_see_each_other_gives_transformers_vectors(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    more = {"use_bidirectional_attention": True, "sliding_window": 16, "layer_types": kinds, "num_key_value_heads": 1}
    model = make_decoder("Gemma3Text", "Model", tmp_path, query_pre_attn_scalar=12, **more)
    describe_modules(tmp_path, "mean", prompts={"query": "w1 w2 "})
    wanted = []
    for text in (*TEXTS, f"w1 w2 {TEXTS[1]}"):
        state = hidden_states(model, ids_of(text)).mean(dim=0)
        wanted.append(state / state.norm())
    for ranks in (1, 2):
        with opened(tmp_path, tensor_parallel_size=ranks) as llm:
            assert (llm.served.task, llm.served.pooling) == ("embed", "mean")
            found = [*llm.embed(TEXTS), *llm.embed(TEXTS[1:2], prompt_name="query")]
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, **CLOSE)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "use_bidirectional_attention": False}))
    with pytest.raises(Unsupported, match="use_bidirectional_attention false"):
        opened(tmp_path)


# -- rerankers that answer yes or no ----------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'query' %}w1 {{ m.content }} w2 {% elif m.role == 'document' %}"
    "w3 {{ m.content }} w4{% else %}w5 {{ m.content }} {% endif %}{% endfor %}"
)
PAIRS = ("w7 w8", ["w9 w10 w11", "w12", text_of(40, 3), "w13 w14"])
YES, NO = 21, 22


def describe_answers(folder: Path, **tokens: int | None) -> None:
    """As sentence-transformers saves a CrossEncoder over a decoder."""
    module = "sentence_transformers.{}"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": module.format("base.modules.transformer.Transformer")},
        {
            "idx": 1, "name": "1", "path": "1_LogitScore",
            "type": module.format("cross_encoder.modules.logit_score.LogitScore"),
        },
    ]  # fmt: skip
    forward = {"method": "forward", "method_output_name": "logits"}
    text = {
        "transformer_task": "text-generation", "module_output_name": "causal_logits",
        "modality_config": {"text": forward, "message": forward | {"format": "flat"}},
    }  # fmt: skip
    settings = {
        "model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.activation.Sigmoid",
        "prompts": {"web": "w6"}, "default_prompt_name": None,
    }  # fmt: skip
    (folder / "1_LogitScore").mkdir()
    files = {
        "modules.json": modules, "sentence_bert_config.json": text, "config_sentence_transformers.json": settings,
        "1_LogitScore/config.json": {"module_input_name": "causal_logits", **tokens},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@torch.inference_mode()
def answered(model: torch.nn.Module, folder: Path, text: str, yes: int, no: int | None) -> float:
    """transformers' model, and the sigmoid."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    logits = model(torch.tensor([ids])).logits[0, -1]
    return float((logits[yes] - (logits[no] if no is not None else 0)).sigmoid())


@pytest.mark.parametrize(("family", "tied", "no"), [("Qwen3", True, NO), ("Llama", False, NO), ("Qwen2", False, None)])
def test_a_decoder_scores_a_pair_by_how_much_likelier_yes_is(
    family: str, tied: bool, no: int | None, tmp_path: Path
) -> None:
    model = make_decoder(family, "ForCausalLM", tmp_path, tie_word_embeddings=tied)
    describe_answers(tmp_path, true_token_id=YES, false_token_id=no)
    query, documents = PAIRS
    wanted = [answered(model, tmp_path, f"w1 {query} w2 w3 {each} w4", YES, no) for each in documents]
    with opened(tmp_path) as llm:
        assert (llm.served.task, llm.served.in_template) == ("score", True)
        np.testing.assert_allclose(llm.score(query, documents), wanted, **CLOSE)
        ranked = llm.rerank(query, documents)
        assert [each.index for each in ranked] == sorted(range(4), key=lambda at: -wanted[at])
        with pytest.raises(InvalidRequest, match="this server's task is score"):
            llm.embed("w1")


def test_a_documents_end_is_cut_where_the_template_and_it_are_too_long(tmp_path: Path) -> None:
    model = make_decoder("Qwen3", "ForCausalLM", tmp_path, tie_word_embeddings=True)
    describe_answers(tmp_path, true_token_id=YES, false_token_id=NO)
    words = text_of(60, 5).split()
    with opened(tmp_path, max_model_len=32) as llm:
        with pytest.raises(InvalidRequest, match="tokens, and the model takes"):
            llm.score("w7", " ".join(words))
        limit = llm.vectors.max_length
        (found,) = llm.score("w7", " ".join(words), truncate=True)
    kept = " ".join(words[: limit - 5])  # beside w1 w7 w2 w3 and w4
    assert found == pytest.approx(answered(model, tmp_path, f"w1 w7 w2 w3 {kept} w4", YES, NO), abs=1e-5)


def test_a_decoder_without_such_files_scores_by_its_words_yes_and_no(tmp_path: Path) -> None:
    model = make_decoder("Qwen3", "ForCausalLM", tmp_path, tie_word_embeddings=True)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(Unsupported, match="no tokens yes and no"):
        opened(tmp_path, task="score")
    file = tmp_path / "tokenizer.json"
    said = json.loads(file.read_text())
    said["model"]["vocab"] = {
        {"w21": "yes", "w22": "no"}.get(word, word): at for word, at in said["model"]["vocab"].items()
    }
    file.write_text(json.dumps(said))
    yes, no = (said["model"]["vocab"][word] for word in ("yes", "no"))
    with opened(tmp_path, task="score") as llm:
        assert llm.score("w7", "w9") == pytest.approx(
            [answered(model, tmp_path, "w1 w7 w2 w3 w9 w4", yes, no)], abs=1e-5
        )


@pytest.mark.full
def test_scores_are_those_of_a_cross_encoder(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    make_decoder("Qwen3", "ForCausalLM", tmp_path, tie_word_embeddings=True)
    describe_answers(tmp_path, true_token_id=YES, false_token_id=NO)
    query, documents = PAIRS
    wanted = sentence_transformers.CrossEncoder(str(tmp_path)).predict([(query, each) for each in documents])
    with opened(tmp_path) as llm:
        np.testing.assert_allclose(llm.score(query, documents), wanted, **CLOSE)
