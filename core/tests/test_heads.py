"""The output head: the checkpoint's own where it brings one, else the embedding where config.json ties them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from anychip import LLM, EngineConfig, SamplingParams
from anychip.errors import CheckpointError
from anychip.launch.plan import plan_engine
from anychip_conformance.equality.oracle import greedy, judge
from anychip_conformance.equality.tiny_models import FAMILIES, THROUGH_TRANSFORMERS, make_checkpoint

WEIGHTS = "model.safetensors"
SAMPLE = ("llama", "gemma2", "gpt-neox")
PROMPT = [5, 300, 77, 41, 9, 130, 28]
NUM_TOKENS = 4


def tied_checkpoint(family: str, folder: Path, **changes: bool) -> tuple[str, str]:
    """Saves a checkpoint whose config.json ties head and embedding, with both in it and equal; gives their names."""
    model = make_checkpoint(family, folder)
    names = {id(module): name for name, module in model.named_modules()}
    head = f"{names[id(model.get_output_embeddings())]}.weight"
    embedding = f"{names[id(model.get_input_embeddings())]}.weight"
    if family == "gpt-neox":  # its files keep an older name
        head = "embed_out.weight"
    edit(folder, lambda tensors: tensors.update({head: tensors[embedding].clone()}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True} | changes))
    return head, embedding


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def give_head(folder: Path, head: str) -> None:
    torch.manual_seed(9)
    edit(folder, lambda tensors: tensors.update({head: torch.randn_like(tensors[head]) * 0.15}))


def check(folder: Path, **settings) -> int:
    """Greedy tokens are transformers'; gives the bytes of the weights, which are those that were planned."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    settings = {"device": "cpu", "num_kv_blocks": 64, "skip_tokenizer": True, "max_model_len": 160, **settings}
    with LLM(str(folder), **settings) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        tokens = llm.generate(PROMPT, sampling)[0].outputs[0].token_ids
        held = llm.worker.memory.weights
    verdict = judge(greedy(reference.eval(), PROMPT, NUM_TOKENS), tokens)
    assert verdict.divergence is None or verdict.excused
    assert plan_engine(EngineConfig(model=str(folder), **settings)).worker.memory.weights == held
    return held


def check_family(family: str, folder: Path) -> None:
    head, _ = tied_checkpoint(family, folder)
    shape = load_file(folder / WEIGHTS)[head].shape
    shared = check(folder)
    give_head(folder, head)
    assert check(folder) == shared + 4 * shape.numel()


@pytest.mark.parametrize("family", SAMPLE)
def test_a_tied_head_is_held_once_unless_its_values_differ(family, tmp_path):
    check_family(family, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("family", sorted({*FAMILIES, *THROUGH_TRANSFORMERS} - {*SAMPLE}))
def test_a_tied_head_is_held_once_unless_its_values_differ_in_every_family(family, tmp_path):
    check_family(family, tmp_path)


@pytest.mark.parametrize("settings", [{"tensor_parallel_size": 2}, {"model_impl": "transformers"}])
def test_a_head_of_its_own_counts_in_every_way_of_running(settings, tmp_path):
    head, _ = tied_checkpoint("llama", tmp_path)
    give_head(tmp_path, head)
    check(tmp_path, **settings)


def test_the_head_alone_is_the_embedding_too(tmp_path):
    _, embedding = tied_checkpoint("llama", tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop(embedding))
    check(tmp_path)


def test_without_a_head_the_embedding_is_used_only_where_they_are_tied(tmp_path):
    head, _ = tied_checkpoint("llama", tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop(head))
    check(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=f"lacks tensor '{head}'"):
        LLM(str(tmp_path), device="cpu", num_kv_blocks=64, skip_tokenizer=True)


def test_a_checkpoint_of_the_decoder_alone_has_its_tensors_found(tmp_path):
    head, _ = tied_checkpoint("qwen3", tmp_path)
    edit(tmp_path, lambda tensors: [tensors.pop(head)] and rename(tensors))
    check(tmp_path)


def rename(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def test_a_quantized_head_is_used_tied_or_not(tmp_path):
    """A head in compressed-tensors' int8; the other matrices are plain."""
    head, _ = tied_checkpoint("llama", tmp_path)
    torch.manual_seed(9)
    values = torch.randint(-127, 128, (512, 64), dtype=torch.int8)
    scale = torch.rand(512, 1) * 0.002
    edit(tmp_path, lambda t: t.update({head: values, "lm_head.weight_scale": scale}))
    weights = {"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": True}
    group = {"targets": ["re:.*lm_head"], "weights": weights, "input_activations": None}
    settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    plain = tmp_path / "plain"
    plain.mkdir()
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / WEIGHTS)
    tensors.pop("lm_head.weight_scale")
    save_file(tensors | {head: values.float() * scale}, plain / WEIGHTS, metadata={"format": "pt"})
    (plain / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(str(tmp_path), device="cpu", num_kv_blocks=64, skip_tokenizer=True) as llm:
        tokens = llm.generate(PROMPT, sampling)[0].outputs[0].token_ids
    assert tokens == greedy(reference, PROMPT, NUM_TOKENS).tokens
