"""Families with latent attention beyond their greedy tokens (test_equality.py): what a published checkpoint holds that
config.json does not describe, quantized containers, devices, and what a token costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anychip.config import EngineConfig
from anychip.entrypoints.cli.main import main
from anychip.errors import AnychipError, CheckpointError, ConfigError
from anychip.launch.plan import plan_engine
from anychip_conformance.equality.oracle import greedy, judge
from anychip_conformance.equality.quantized_models import make_quantized_checkpoint
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import NUM_TOKENS, Case, generate, open_llm, prompts

WEIGHTS = "model.safetensors"


def check_greedy(model: Any, family: str, folder: Path, device: str = "cpu", **settings: Any) -> tuple[str, ...]:
    """Compares greedy tokens; returns the worker's notes."""
    with open_llm(Case(family, 64, True, False, True, device), folder, **settings) as llm:
        verdicts = [
            judge(greedy(model, prompt, NUM_TOKENS), tokens)
            for prompt, tokens in zip(prompts(), generate(llm), strict=True)
        ]
        assert not [v for v in verdicts if v.divergence is not None and not v.excused]
        return llm.worker.notes


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# -- layers that config.json does not describe ---------------------------------------------------------------


def test_layers_that_config_json_does_not_describe_are_said_and_left_out(tmp_path):
    model = make_checkpoint("deepseek-v3", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    further = {name.replace(".3.", ".4.", 1): value.clone() for name, value in tensors.items() if ".layers.3." in name}
    further["model.layers.4.eh_proj.weight"] = torch.zeros(64, 128)
    save_file({**tensors, **further}, tmp_path / WEIGHTS, {"format": "pt"})
    notes = check_greedy(model, "deepseek-v3", tmp_path)
    said = "has tensors of layer 4, counted from 0, and config.json describes 4 layers: they are left out"
    assert sum(said in note for note in notes) == 1
    planned = plan_engine(EngineConfig(model=str(tmp_path), device="cpu")).worker.notes
    assert sum(said in note for note in planned) == 1


def test_a_layer_within_those_described_is_never_left_out(tmp_path):
    make_checkpoint("deepseek-v3", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(64, 128)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.3\.eh_proj\.weight.*has no place"):
        open_llm(Case("deepseek-v3", 64, True, False, True, "cpu"), tmp_path)


# -- quantized containers -------------------------------------------------------------------------------------


def test_factors_are_turned_back_from_a_container(tmp_path):
    model, _ = make_quantized_checkpoint("gptq-zeros", tmp_path, "deepseek-v2")
    check_greedy(model, "deepseek-v2", tmp_path)


def test_blocks_of_fp8_become_the_factors_that_they_stand_for(tmp_path):
    """Activations are rounded in products, and the factors are none: tokens are not those of transformers' model."""
    _, matrices = make_quantized_checkpoint("fp8-block", tmp_path, "deepseek-v2")
    with open_llm(Case("deepseek-v2", 64, True, False, True, "cpu"), tmp_path) as llm:
        for index, layer in enumerate(llm.engine.executor.worker.program.model.layers):
            latent = layer.attention.layer
            held = torch.cat((latent.k_up, latent.v_up), dim=1).flatten(0, 1)
            expected = matrices[f"model.layers.{index}.self_attn.kv_b_proj"]
            torch.testing.assert_close(held, expected, rtol=0, atol=0)
        assert all(len(tokens) == NUM_TOKENS for tokens in generate(llm))


def test_factors_are_not_quantized_at_load(tmp_path):
    make_checkpoint("deepseek-v2", tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    with open_llm(Case("deepseek-v2", 64, True, False, True, "cpu"), tmp_path, quantization="int8") as llm:
        latent = llm.engine.executor.worker.program.model.layers[2].attention.layer
        held = torch.cat((latent.k_up, latent.v_up), dim=1).flatten(0, 1)
        assert torch.equal(held, stored["model.layers.2.self_attn.kv_b_proj.weight"])


# -- devices and settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "settings", "reason"),
    [
        ("fake-hostlen", {}, "latent attention"),
        ("cpu", {"kv_cache_dtype": "int8"}, "latent rows in int8; float8_e4m3fn is nearest"),
        ("cpu", {"tensor_parallel_size": 3}, "4 attention heads do not split evenly over 3 ranks; 1, 2, 4 would"),
    ],
)
def test_what_cannot_be_is_refused_by_name(device, settings, reason, tmp_path):
    make_checkpoint("deepseek-v2", tmp_path)
    with pytest.raises(AnychipError, match=reason):
        plan_engine(EngineConfig(model=str(tmp_path), device=device, dtype="float32", **settings))


def test_index_keys_in_fp8_are_refused_by_name(tmp_path):
    make_checkpoint("deepseek-v32", tmp_path)
    with pytest.raises(AnychipError, match="index keys in float8_e4m3fn; float32 is available"):
        plan_engine(EngineConfig(model=str(tmp_path), device="cpu", dtype="float32", kv_cache_dtype="fp8"))


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek-v2", {"num_experts_per_tok": 5}, "num_experts_per_tok 5, and 2 of 4 groups of 8 experts hold 4"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
    ],
)
def test_settings_that_are_not_served_are_refused_by_name(family, fields, reason, tmp_path):
    make_checkpoint(family, tmp_path)
    set_config(tmp_path, **fields)
    with pytest.raises((AnychipError, ConfigError), match=reason):
        plan_engine(EngineConfig(model=str(tmp_path), device="cpu"))


# -- rows in fp8 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"max_num_batched_tokens": 7}, {"prefix_caching": False}])
def test_rows_in_fp8_answer_alike_however_prompts_are_cut_and_found(settings, tmp_path):
    """Every token attends to rounded rows, those of its own step too, so that no setting decides what is rounded."""
    make_checkpoint("deepseek-v2", tmp_path)
    case, found = Case("deepseek-v2", 4096, True, True, True, "cpu"), []
    for given in ({}, settings):
        with open_llm(case, tmp_path, kv_cache_dtype="fp8", **given) as llm:
            found.append(list(generate(llm)))
    assert found[0] == found[1]


# -- what a token costs ---------------------------------------------------------------------------------------


DEEPSEEK_V3 = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}


def test_a_token_of_deepseek_v3s_shape_takes_its_latent_rows(tmp_path, capsys):
    """Sizes that the cache does not depend on are small."""
    make_checkpoint("deepseek-v3", tmp_path, num_hidden_layers=1)
    set_config(tmp_path, **DEEPSEEK_V3, num_hidden_layers=61, dtype="bfloat16")
    (tmp_path / WEIGHTS).unlink()
    expected = (512 + 64) * 2 * 61
    memory = plan_engine(EngineConfig(model=str(tmp_path), device="cpu")).worker.memory
    assert (memory.latent_token, memory.kv_token, memory.state_sequence) == (expected, 0, 0)
    assert main(["plan", str(tmp_path), "--device", "cpu"]) == 0
    assert f"of a token {expected} B latent rows" in " ".join(capsys.readouterr().out.split())


def test_ranks_hold_all_of_a_row(tmp_path):
    make_checkpoint("deepseek-v3", tmp_path)
    one, two = (
        plan_engine(EngineConfig(model=str(tmp_path), device="cpu", tensor_parallel_size=size)).worker.memory
        for size in (1, 2)
    )
    assert one.latent_token == two.latent_token == (32 + 8) * 4 * 4


def test_rows_in_fp8_take_half_the_bytes_of_bfloat16s(tmp_path):
    make_checkpoint("deepseek-v3", tmp_path)
    wide, narrow = (
        plan_engine(
            EngineConfig(model=str(tmp_path), device="cpu", dtype="bfloat16", kv_cache_dtype=asked)
        ).worker.memory
        for asked in ("auto", "fp8")
    )
    assert (wide.latent_token, narrow.latent_token) == ((32 + 8) * 2 * 4, (32 + 8) * 4)
