"""Families whose queries choose the tokens they attend to, beyond their greedy tokens (test_equality.py)."""

from __future__ import annotations

import json

import pytest
import torch

from anychip.config import EngineConfig
from anychip.errors import AnychipError, CheckpointError
from anychip.launch.plan import plan_engine
from anychip.model_config import load_model_config
from anychip.models.deepseek_sparse import indexer_types
from anychip.plugin_api import ForwardContext
from anychip_conformance.equality.oracle import greedy, judge
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import NUM_TOKENS, Case, generate, open_llm, prompts


def set_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"indexer_types": ["full", "shared", "shared", "full"]}, "FSSF"),
        ({"index_topk_pattern": "FFSS"}, "FFSS"),
        ({}, "FFFF"),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, "FSFS"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 2}, "FFSS"),
    ],
)
def test_which_layers_choose_is_read_as_transformers_reads_it(tmp_path, fields, expected):
    from transformers import GlmMoeDsaConfig

    make_checkpoint("glm-5", tmp_path)
    set_config(tmp_path, **({"indexer_types": None} | fields))
    kinds = indexer_types(load_model_config(str(tmp_path)))
    assert "".join(kind[0].upper() for kind in kinds) == expected
    assert GlmMoeDsaConfig(num_hidden_layers=4, **fields).indexer_types == kinds


@pytest.mark.parametrize("kinds", [["shared", "full", "full", "full"], ["full"] * 3, ["full", "some", "full", "full"]])
def test_layers_that_could_attend_to_nothing_are_refused(tmp_path, kinds):
    make_checkpoint("glm-5", tmp_path)
    set_config(tmp_path, indexer_types=kinds)
    with pytest.raises(CheckpointError, match="full or shared for each of 4 layers"):
        open_llm(Case("glm-5", 64, True, False, True, "cpu"), tmp_path)


def test_a_layer_that_shares_a_choice_attends_to_another_layers(tmp_path, monkeypatch):
    """What it attends to is counted: two of four layers choose, and all four attend to a choice."""
    seen = {"choose": 0, "attend_latent": 0}
    for name in seen:
        plain = getattr(ForwardContext, name)

        def counted(self, *args, _plain=plain, _name=name, **more):
            seen[_name] += _name == "choose" or self.chosen is not None
            return _plain(self, *args, **more)

        monkeypatch.setattr(ForwardContext, name, counted)
    model = make_checkpoint("glm-5", tmp_path)
    with open_llm(Case("glm-5", 4096, False, False, False, "cpu"), tmp_path) as llm:
        seen.update(choose=0, attend_latent=0)
        tokens = list(generate(llm))
    assert seen["choose"] > 0
    assert seen["attend_latent"] == 2 * seen["choose"]
    last = prompts()[-1]
    assert judge(greedy(model, last, NUM_TOKENS), tokens[-1]).divergence is None


def test_where_all_tokens_are_chosen_their_scores_change_nothing(tmp_path):
    model = make_checkpoint("deepseek-v32", tmp_path)
    set_config(tmp_path, index_topk=512)
    with torch.inference_mode():
        for layer in model.model.layers:  # in the oracle alone
            layer.self_attn.indexer.index_topk = 512
            layer.self_attn.indexer.weights_proj.weight.mul_(-1)
    with open_llm(Case("deepseek-v32", 64, True, False, True, "cpu"), tmp_path) as llm:
        tokens = list(generate(llm))
    for prompt, got in zip(prompts()[-3:], tokens[-3:], strict=True):
        assert judge(greedy(model, prompt, NUM_TOKENS), got).divergence is None


def test_an_index_key_counts_among_the_bytes_of_a_token(tmp_path):
    make_checkpoint("deepseek-v32", tmp_path)
    memory = plan_engine(EngineConfig(model=str(tmp_path), device="cpu")).worker.memory
    assert memory.latent_token == (32 + 8 + 16) * 4 * 4


def test_a_device_without_the_choice_refuses_the_model_by_name(tmp_path):
    make_checkpoint("deepseek-v32", tmp_path)
    with pytest.raises(AnychipError, match="sparse attention"):
        open_llm(Case("deepseek-v32", 64, True, False, True, "fake-hostlen"), tmp_path)
