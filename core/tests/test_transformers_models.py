"""Models in transformers' own code: what runs is in test_equality; here, what is refused and how one asks."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BigBirdConfig,
    BigBirdForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from anychip import LLM, SamplingParams
from anychip.errors import CheckpointError, ConfigError, Unsupported
from anychip.models.transformers_experts import FusedExperts
from anychip_conformance.equality.causal_classes import CausalClass, causal_classes
from anychip_conformance.equality.every_class import Outcome, walk
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
    with pytest.raises(
        ConfigError, match="'GPTNeoXForCausalLM' has no native family; there are BambaForCausalLM, BertModel"
    ):
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


SAMPLE = ("bart", "bloom", "gptj", "jetmoe", "minicpm3", "olmoe")
"""Positions that the decoder counts itself; ALiBi; attention by an adapter; code that looks at values; values shorter
than keys; experts that the checkpoint keeps apart. tools/walk_transformers.py tries every class."""


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_class_of_the_library_gives_its_tokens(model_type, tmp_path):
    each = next(each for each in causal_classes() if each.model_type == model_type)
    outcome = walk(each, tmp_path)
    assert (outcome.result, outcome.why) == ("equal", "")


def answers(model: str, **settings) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM(model, **{**SETTINGS, **settings}) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, sampling)]


PROMPTS = [[5, 6, 7], list(range(40, 60))]


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "initializer_range": 0.15}
    return MixtralForCausalLM(MixtralConfig(**sizes)).eval()


def test_experts_apart_or_stacked_are_the_platforms_fused_ones(tmp_path):
    """As published, and as the library holds them; whole, and split over ranks."""
    model = mixtral()
    expected = [greedy(model, prompt, 6).tokens for prompt in PROMPTS]
    apart = saved(model, tmp_path / "apart")
    stacked = shutil.copytree(apart, tmp_path / "stacked")
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, stacked / "model.safetensors")
    for folder in (apart, str(stacked)):
        assert answers(folder, model_impl="transformers") == expected
    assert answers(apart, model_impl="transformers", tensor_parallel_size=2) == expected
    with LLM(apart, model_impl="transformers", **SETTINGS) as llm:
        modules = llm.engine.executor.worker.program.model.decoder.module.modules()
        assert sum(isinstance(module, FusedExperts) for module in modules) == SIZES["num_hidden_layers"]


def test_experts_that_kernels_have_not_run_in_the_librarys_code(tmp_path):
    model = mixtral()
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = torch.nn.ReLU()
    model.config.hidden_act = "relu"
    expected = [greedy(model, prompt, 6).tokens for prompt in PROMPTS]
    assert answers(saved(model, tmp_path), model_impl="transformers") == expected


def test_a_checkpoint_whose_experts_are_other_than_config_says_is_refused(tmp_path):
    model = saved(mixtral(), tmp_path, num_local_experts=8)
    with pytest.raises(CheckpointError, match=r"moe.gate.weight' .* has shape \[4, 64\], the model wants \[8, 64\]"):
        LLM(model, model_impl="transformers", **SETTINGS)
    fewer = saved(mixtral(), tmp_path, num_local_experts=2)
    with pytest.raises(CheckpointError, match=r"experts.2.w1.weight' .* has no place in the model"):
        LLM(fewer, model_impl="transformers", **SETTINGS)


def test_attention_that_reaches_no_interface_is_refused(tmp_path):
    config = BigBirdConfig(**SIZES, is_decoder=True, attention_type="original_full")
    with pytest.raises(Unsupported, match="BigBirdForCausalLM through transformers: its attention does not go through"):
        LLM(saved(BigBirdForCausalLM(config), tmp_path), **SETTINGS)


def test_scores_that_paged_attention_does_not_make_are_refused(tmp_path):
    model = saved(DogeForCausalLM(DogeConfig(**SIZES)), tmp_path)
    with pytest.raises(Unsupported, match="DogeAttention through transformers: a mask of its own"):
        LLM(model, **SETTINGS)


def test_whatever_the_librarys_code_raises_is_a_refusal(tmp_path, monkeypatch):
    model = saved(GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=512)), tmp_path)

    def broken(*others, **named):
        raise AttributeError("no such thing")

    monkeypatch.setattr(GPT2Block, "forward", broken)
    with pytest.raises(Unsupported, match="its code raised AttributeError as it ran: no such thing"):
        LLM(model, **SETTINGS)
    monkeypatch.setattr(GPT2Model, "__init__", broken)
    with pytest.raises(Unsupported, match="its code raised AttributeError as it was built: no such thing"):
        LLM(model, **SETTINGS)


@pytest.mark.parametrize("served", [96, 40])
def test_a_rotary_embedding_that_follows_the_batch_is_held_at_the_served_length(served, tmp_path):
    """What the library computes for a batch whose longest request has so many tokens."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)],
    }  # fmt: skip
    config = LlamaConfig(**SIZES, initializer_range=0.15, rope_parameters=rope, max_position_embeddings=128)
    original = LlamaForCausalLM(config).eval()
    given = answers(saved(original, tmp_path), model_impl="transformers", max_model_len=served)
    if served > 64:  # the library looks at the longest request: this one makes it take the long factors
        rotary = original.model.rotary_emb
        rotary.inv_freq.copy_(ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=served)[0])
        rotary.rope_type = "default"
    assert given == [greedy(original, prompt, 6).tokens for prompt in PROMPTS]


@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_dynamic_frequencies_are_those_of_the_served_length(impl, tmp_path):
    """Within the trained length they are the plain ones; --max-model-len may stretch it by the factor."""
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = LlamaConfig(**SIZES, initializer_range=0.15, rope_parameters=rope, max_position_embeddings=64)
    original = LlamaForCausalLM(config).eval()
    model = saved(original, tmp_path)
    assert answers(model, model_impl=impl) == [greedy(original, prompt, 6).tokens for prompt in PROMPTS]
    stretched = answers(model, model_impl=impl, max_model_len=128)
    rotary = original.model.rotary_emb
    rotary.inv_freq.copy_(ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=128)[0])
    rotary.rope_type = "default"
    assert stretched == [greedy(original, prompt, 6).tokens for prompt in PROMPTS]
    with pytest.raises(ConfigError, match="max_model_len is 129; the model has 128 positions"):
        LLM(model, model_impl=impl, max_model_len=129, **SETTINGS)


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


def test_the_page_of_classes_counts_those_with_attention_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    tool = importlib.import_module("walk_transformers")
    results = [("attention", "equal", True), ("attention", "equal", False), ("attention", "refused", False)]
    results += [("more state", "refused", False), ("other", "not tried", False)]
    outcomes = [
        Outcome(
            each=CausalClass(f"kind{n}", f"Class{n}"), kind=kind, native=native, result=result, why="a | b" * (n > 1)
        )
        for n, (kind, result, native) in enumerate(results)
    ]
    share, count = tool.equal_share(outcomes)
    assert (round(share, 3), count) == (0.667, 3)
    page = tool.page(outcomes)
    assert "| `Class0` | kind0 | native |  |" in page
    assert "| `Class1` | kind1 | through transformers |  |" in page
    assert "| `Class2` | kind2 | refused | a \\| b |" in page
    assert "| 3 | layers keep keys and values alone | 2 | 1 | 0 |" in page
