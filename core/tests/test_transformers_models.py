"""Models in transformers' own code: what runs is in test_equality; here, what is refused and how one asks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from anychip import LLM, SamplingParams
from anychip.errors import ConfigError, Unsupported
from anychip_conformance.equality.oracle import greedy, judge
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import NUM_TOKENS, Case, generate, open_llm, prompts

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
SETTINGS = {"device": "cpu", "skip_tokenizer": True, "num_kv_blocks": 64}


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_a_native_family_answers_the_same_in_the_librarys_code(family, tmp_path):
    """Windows, softcaps, two rotary embeddings: what the library passes on is what the family says itself."""
    model = make_checkpoint(family, tmp_path)
    with open_llm(Case(family, 64, True, False, True, "cpu"), tmp_path, model_impl="transformers") as llm:
        assert type(llm.engine.executor.worker.program.model).__name__ == "TransformersModel"
        answers = list(generate(llm))
    for prompt, tokens in zip(prompts(), answers, strict=True):
        verdict = judge(greedy(model, prompt, NUM_TOKENS), tokens)
        assert verdict.divergence is None or verdict.excused


def test_quantization_at_load_works_there_too(tmp_path):
    make_checkpoint("olmo2", tmp_path)
    with open_llm(Case("olmo2", 64, True, False, True, "cpu"), tmp_path, quantization="int8") as llm:
        held = llm.worker.memory.weights
        assert all(len(tokens) == NUM_TOKENS for tokens in generate(llm))
    with open_llm(Case("olmo2", 64, True, False, True, "cpu"), tmp_path) as llm:
        assert held < llm.worker.memory.weights


def test_no_native_family_can_be_insisted_on(tmp_path):
    make_checkpoint("gpt-neox", tmp_path)
    with pytest.raises(ConfigError, match="'GPTNeoXForCausalLM' has no native family; there are BertModel"):
        LLM(str(tmp_path), model_impl="native", **SETTINGS)


def test_without_the_library_the_way_out_is_named(tmp_path):
    make_checkpoint("gpt-neox", tmp_path)
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "from anychip.entrypoints.cli.main import main\n"
        "sys.exit(main(['generate', sys.argv[1], '--device', 'cpu', '--skip-tokenizer', '--prompt', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'GPTNeoXForCausalLM' has no native family, and transformers" in done.stderr
    assert "pip install anychip[transformers]" in done.stderr


def saved(model, tmp_path: Path, **changes) -> str:
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    return str(tmp_path)


def test_a_model_whose_attention_has_no_interface_is_refused(tmp_path):
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    model = saved(FalconForCausalLM(FalconConfig(**sizes)), tmp_path, max_position_embeddings=256)
    with pytest.raises(Unsupported, match="FalconForCausalLM through transformers: its attention does not go through"):
        LLM(model, **SETTINGS)


def test_stacked_experts_are_refused(tmp_path):
    model = saved(MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2)), tmp_path)
    with pytest.raises(Unsupported, match="is stacked, .*: experts need a native family"):
        LLM(model, model_impl="transformers", **SETTINGS)


def test_a_rotary_embedding_that_changes_with_the_batch_is_refused(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = saved(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path, rope_parameters=rope)
    with pytest.raises(Unsupported, match="its rotary embedding is dynamic, which changes with the longest request"):
        LLM(model, model_impl="transformers", **SETTINGS)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class AcmeConfig(LlamaConfig):
    model_type = "acme"


class AcmeForCausalLM(LlamaForCausalLM):
    config_class = AcmeConfig
"""


def test_code_in_a_checkpoint_runs_only_where_it_is_allowed(tmp_path):
    torch.manual_seed(0)
    original = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.15)).eval()
    names = {"AutoConfig": "acme_model.AcmeConfig", "AutoModelForCausalLM": "acme_model.AcmeForCausalLM"}
    model = saved(original, tmp_path, auto_map=names, architectures=["AcmeForCausalLM"], model_type="acme")
    (tmp_path / "acme_model.py").write_text(CODE)
    with pytest.raises(
        ConfigError, match=r"code in the checkpoint \(acme_model.AcmeForCausalLM\), which is not run unless"
    ):
        LLM(model, **SETTINGS)
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM(model, trust_remote_code=True, **SETTINGS) as llm:
        tokens = llm.generate([5, 6, 7], sampling)[0].outputs[0].token_ids
    assert tokens == greedy(original, [5, 6, 7], 6).tokens
