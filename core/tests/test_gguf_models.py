"""A GGUF file gives the tokens that the checkpoint gives which it was made from, and matrices in blocks those of what
gguf-py makes of them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf_files import convert, plain, random_blocks
from gguf_metadata import write_gguf
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from anychip import LLM, SamplingParams
from anychip.config import EngineConfig
from anychip.errors import CheckpointError, ConfigError
from anychip.launch.plan import plan_engine
from anychip.model_config import load_model_config
from anychip.weights.gguf_checkpoint import open_checkpoint
from anychip_conformance.equality import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE
from anychip_conformance.equality.oracle import greedy, judge
from anychip_conformance.equality.tiny_models import make_checkpoint

SETTINGS = {"device": "cpu", "dtype": "float32", "skip_tokenizer": True, "num_kv_blocks": 64, "max_model_len": 160}
PROMPTS = [[7, 3, 9], list(range(3, 103)), [11] * 40]


def saved(model, folder):
    model.eval().save_pretrained(folder)
    return model


def gemma3(folder):
    """With the windows that a file implies: five windowed layers, and a full one."""
    common = {
        "vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "intermediate_size": 128, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "initializer_range": 0.15,
    }  # fmt: skip
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    }
    config = Gemma3TextConfig(**common, sliding_window=32, query_pre_attn_scalar=24, rope_parameters=ropes)
    return saved(Gemma3ForCausalLM(config), folder)


def qwen2(folder):
    """Without the windows that a file cannot tell."""
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, intermediate_size=128, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.15, tie_word_embeddings=True,
    )  # fmt: skip
    return saved(Qwen2ForCausalLM(config), folder)


def deepseek_v3(folder):
    """With one temperature, as published models have it: a file has one."""
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = DeepseekV3Config(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=24,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24,
        first_k_dense_replace=1, moe_intermediate_size=32, num_experts_per_tok=3, n_routed_experts=8,
        n_shared_experts=1,
        n_group=2, topk_group=1, routed_scaling_factor=1.5, max_position_embeddings=512, initializer_range=0.15,
        rope_parameters=rope, tie_word_embeddings=False,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)
    return saved(model, folder)


def starcoder2(folder):
    """Without the windows that a file cannot tell."""
    config = Starcoder2Config(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, intermediate_size=128, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15, max_position_embeddings=512,
    )  # fmt: skip
    model = Starcoder2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    return saved(model, folder)


MAKERS = {
    **{
        family: lambda folder, family=family: make_checkpoint(family, folder)
        for family in ("llama", "mixtral", "qwen3", "qwen3-moe", "gemma2", "phi3", "granite", "gpt-oss", "deepseek-v2")
    },
    "deepseek-v3": deepseek_v3,
    "starcoder2": starcoder2,
    "gemma3": gemma3,
    "qwen2": qwen2,
}


def tokens_of(path, prompts=PROMPTS, **settings) -> list[list[int]]:
    with LLM(str(path), **{**SETTINGS, **settings}) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        return [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]


@pytest.mark.parametrize("family", MAKERS)
def test_a_file_gives_the_tokens_of_its_checkpoint(family, tmp_path):
    model = MAKERS[family](tmp_path)
    metadata, tensors = convert(family, model)
    file = write_gguf(tmp_path / "model.gguf", metadata, plain(tensors))
    held, expected = (
        {name: view.read().clone() for name, view in open_checkpoint(path).views()} for path in (file, tmp_path)
    )
    # GPT-OSS stacks its experts, and a tied head may be listed.
    assert all(".experts." in name or name == "lm_head.weight" for name in held.keys() ^ expected.keys())
    for name in held.keys() & expected.keys():
        torch.testing.assert_close(held[name], expected[name], rtol=0, atol=1e-6 if "norm" in name else 0)
    found = tokens_of(file)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        verdict = judge(greedy(model, prompt, len(tokens)), tokens)
        assert verdict.divergence is None or verdict.excused
    assert len({*map(tuple, found)}) == len(PROMPTS)


def in_blocks(tensors, types):
    """Tensors whose names hold a key of `types`, replaced by random blocks of that type: as a file stores them, and as
    floats by gguf-py."""
    stored, floats = plain(tensors), dict(tensors)
    for number, (name, tensor) in enumerate(tensors.items()):
        kind = next((kind for part, kind in types.items() if part in name and name.endswith("weight")), None)
        if kind is None or tensor.dim() < 2:
            continue
        rows = random_blocks(kind, tensor.numel() // tensor.shape[-1], tensor.shape[-1], number)
        stored[name] = (kind, tuple(tensor.shape), rows.tobytes())
        wide = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
        floats[name] = torch.from_numpy(wide).view(tensor.shape)
    return stored, floats


SMALL = {"attn": "Q4_0", "ffn_gate": "Q4_1", "ffn_up": "Q4_1", "ffn_down": "Q8_0", "token_embd": "Q8_0"}
MIXED = {"attn_v": "Q6_K", "attn": "Q4_K", "ffn_down": "Q6_K", "ffn_": "Q4_K", "output.": "Q6_K", "token_embd": "Q4_K"}
LOW = {"attn_v": "Q5_1", "attn": "IQ4_NL", "ffn_down": "Q5_K", "ffn_": "Q2_K", "output.": "Q3_K", "token_embd": "Q5_0"}
EXPERTS = {"_exps": "MXFP4", "attn_": "Q8_0", "token_embd": "Q8_0", "output.": "Q8_0"}
TIED = {"token_embd": "Q8_0", "attn": "Q4_0", "exps": "Q4_0"}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("family", "types", "changes", "settings"),
    [
        ("llama", SMALL, {}, {}),
        ("llama", MIXED, WIDE, {}),  # a product of two types; experts of two types
        ("qwen3-moe", {"ffn_down_exps": "Q5_0", "exps": "Q4_K", **LOW}, WIDE, {}),
        ("qwen3", TIED, {}, {}),
        ("gpt-oss", EXPERTS, {}, {}),
        (
            "llama",
            SMALL,
            {"hidden_size": 128, "head_dim": 32},
            {"device": "fake-spmd"},
        ),  # ranks that hold a share of each
    ],
)
def test_blocks_give_the_tokens_of_what_they_stand_for(family, types, changes, settings, tmp_path):
    metadata, tensors = convert(family, make_checkpoint(family, tmp_path, **changes))
    stored, floats = in_blocks(tensors, types)
    blocks = write_gguf(tmp_path / "blocks.gguf", metadata, stored)
    wide = write_gguf(tmp_path / "wide.gguf", metadata, plain(floats))
    assert tokens_of(blocks, **settings) == tokens_of(wide)


def test_a_plan_counts_what_a_start_holds_and_the_start_says_how_tensors_are_stored(tmp_path):
    metadata, tensors = convert("llama", make_checkpoint("llama", tmp_path))
    stored, _ = in_blocks(tensors, SMALL)
    file = write_gguf(tmp_path / "model.gguf", metadata, stored)
    settings = {key: value for key, value in SETTINGS.items() if key != "skip_tokenizer"}
    plan = plan_engine(EngineConfig(model=str(file), **settings))
    assert plan.quantization == "gguf"
    with LLM(str(file), **SETTINGS) as llm:
        assert llm.worker.memory.weights == plan.worker.memory.weights
        assert any("Q4_0" in note and "Q8_0" in note for note in llm.engine.executor.ready.notes)


def test_types_that_no_scheme_holds_become_int8_and_are_named(tmp_path):
    metadata, tensors = convert("llama", make_checkpoint("llama", tmp_path, **WIDE))
    stored = plain(tensors)
    rng = np.random.default_rng(0)
    for name, tensor in tensors.items():
        if "ffn_up" in name:
            codes = rng.integers(0, 256, (tensor.shape[0] * tensor.shape[1] // 256, 66), dtype=np.uint8)
            codes[:, 64:] = rng.normal(0, 0.1, len(codes)).astype(np.float16).view(np.uint8).reshape(-1, 2)
            stored[name] = ("TQ2_0", tuple(tensor.shape), codes.tobytes())
    file = write_gguf(tmp_path / "model.gguf", metadata, stored)
    with LLM(str(file), **SETTINGS) as llm:
        assert "TQ2_0: no scheme holds such tensors; matrices become int8" in llm.engine.executor.ready.notes


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return convert("llama", make_checkpoint("llama", tmp_path_factory.mktemp("llama")))


def test_pieces_are_one_model_from_any_of_them(llama, tmp_path):
    metadata, tensors = llama
    names = sorted(tensors)
    split = {"split.count": 2, "split.tensors.count": len(names)}
    for number, held in enumerate((names[::2], names[1::2])):
        own = {**(metadata if number == 0 else {}), **split, "split.no": number}
        write_gguf(tmp_path / f"m-0000{number + 1}-of-00002.gguf", own, plain({name: tensors[name] for name in held}))
    whole = write_gguf(tmp_path / "whole.gguf", metadata, plain(tensors))
    expected = {name: view.read().clone() for name, view in open_checkpoint(whole).views()}
    second = tmp_path / "m-00002-of-00002.gguf"
    found = {name: view.read().clone() for name, view in open_checkpoint(second).views()}
    assert found.keys() == expected.keys() == open_checkpoint(second).names
    assert all(found[name].equal(expected[name]) for name in expected)
    assert load_model_config(str(second)).raw == load_model_config(str(whole)).raw
    second.unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002.gguf is missing: .* one of 2 pieces"):
        tokens_of(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.parametrize(
    ("metadata", "tensors", "error", "said"),
    [
        ({"general.architecture": "mamba"}, {}, ConfigError, "'mamba', which is not served from GGUF; served"),
        ({"llama.block_count": 5}, {}, CheckpointError, "lacks tensor 'model.layers.4.input_layernorm.weight'"),
        ({"llama.block_count": "4"}, {}, CheckpointError, "'llama.block_count' is '4', expected a whole number"),
        ({"llama.attention.head_count_kv": [2, 1]}, {}, CheckpointError, "differs between layers"),
        ({"llama.rope.dimension_count": 8}, {}, ConfigError, r"llama.rope.dimension_count 8 and heads of 16"),
        ({"llama.rope.scaling.type": "ntk", "llama.rope.scaling.factor": 2.0}, {"rope_freqs.weight": None}, ConfigError,
         "rotary embedding by 'ntk'"),
        ({}, {"blk.0.attn_q.weight": torch.zeros(32, 64)}, CheckpointError,
         r"tensor 'blk.0.attn_q.weight' of .* has shape \[32, 64\], the model wants \[64, 64\]"),
        ({}, {"blk.0.attn_x.weight": torch.zeros(2, 2)}, CheckpointError, "'blk.0.attn_x.weight' .* has no place"),
        ({}, {"token_embd.weight": None}, CheckpointError, "no tensor 'token_embd.weight' of two dimensions"),
        ({"llama.context_length": None}, {}, CheckpointError, "no 'llama.context_length' in its metadata"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_model_is_refused_with_the_reason(llama, metadata, tensors, error, said, tmp_path):
    given = [{**llama[0], **metadata}, {**llama[1], **tensors}]
    kept = [{name: value for name, value in each.items() if value is not None} for each in given]
    with pytest.raises(error, match=said):
        tokens_of(write_gguf(tmp_path / "model.gguf", kept[0], plain(kept[1])))


def test_scales_that_are_no_numbers_are_refused(llama, tmp_path):
    stored, _ = in_blocks(llama[1], SMALL)
    kind, shape, held = stored["blk.1.ffn_up.weight"]
    stored["blk.1.ffn_up.weight"] = (kind, shape, b"\x00\x7e" + held[2:])
    with pytest.raises(CheckpointError, match="'blk.1.ffn_up.weight' .* holds a scale that is not a finite number"):
        tokens_of(write_gguf(tmp_path / "model.gguf", llama[0], stored))


def test_no_other_code_than_the_native_families_serves_a_file(llama, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", llama[0], plain(llama[1]))
    with pytest.raises(ConfigError, match="native families alone serve GGUF"):
        tokens_of(file, model_impl="transformers")
