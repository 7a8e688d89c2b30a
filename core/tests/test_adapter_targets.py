"""Adapters beyond products: experts, embeddings, heads, and DoRA's magnitudes. Tokens are those of transformers' model
with the adapter merged in float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import DEVICES, PROMPTS, Base, drawn, greedy, untie

from anychip import LLM
from anychip.config import EngineConfig
from anychip.entrypoints.cli.main import main
from anychip.errors import AdapterRefused, ConfigError
from anychip_conformance.equality.tiny_adapters import ATTENTION, EVERY, TinyAdapter

ENDS = ("embed_tokens", "lm_head")
DENSE = {
    "a0": TinyAdapter(seed=21, rank=1, targets=(*ENDS, *EVERY)),
    "a1": TinyAdapter(seed=22, rank=8, alpha=32.0, use_rslora=True, targets=("embed_tokens",), size=1.5),
    "a2": TinyAdapter(seed=23, rank=64, targets=("lm_head", "v_proj"), ranks={"v_proj": 8}),
    "a3": TinyAdapter(seed=24, rank=8, dora=True),
    "a4": TinyAdapter(seed=25, rank=4, dora=True, targets=("q_proj", "o_proj", "down_proj", "lm_head")),
}
SPARSE = {
    "a0": TinyAdapter(seed=31, rank=1, targets=("experts", "gate")),
    "a1": TinyAdapter(seed=32, rank=8, targets=("experts", *ATTENTION)),
    "a2": TinyAdapter(seed=33, rank=64, targets=("experts",), ranks={"up_proj": 3}),
    "a3": TinyAdapter(seed=34, rank=8, targets=("experts",), stacked=True),
    "a4": TinyAdapter(seed=35, rank=8, dora=True, targets=ATTENTION),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base("qwen2", tmp_path_factory.mktemp("dense"), DENSE, untied=True)  # queries, keys and values have biases


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base("qwen3-moe", tmp_path_factory.mktemp("sparse"), SPARSE)


def check_batches(base: Base, **settings: object) -> None:
    """Five adapters and none in a batch, and then each prompt with another one of them."""
    names = [*base.adapters, None]
    assert len({tuple(map(tuple, tokens)) for tokens in base.expected.values()}) == 6, "adapters that change nothing"
    with base.opened(**settings) as llm:
        for turn in range(2):
            each = names[turn:] + names[:turn]
            assert drawn(llm, each) == [base.expected[name][number] for number, name in enumerate(each)]
        assert drawn(llm, None) == base.expected[None]


def some(*sampled: str) -> list[object]:
    """Every device; those that are not sampled with the full tests."""
    return [name if name in sampled else pytest.param(name, marks=pytest.mark.full) for name in DEVICES]


@pytest.mark.parametrize("device", some("cpu", "cpu-tp2"))
def test_embeddings_heads_and_magnitudes_in_one_batch(dense: Base, device: str) -> None:
    check_batches(dense, **DEVICES[device])


def test_the_head_of_a_tied_model_changes_and_its_embedding_does_not(tmp_path: Path) -> None:
    tiny = {"a": TinyAdapter(seed=26, rank=8, targets=("lm_head",), dora=True)}
    base = Base("qwen3", tmp_path, tiny)
    wanted = [greedy(tiny["a"].merged(untie(copy.deepcopy(base.model))), ids) for ids in PROMPTS]
    with base.opened(device="cpu") as llm:
        assert drawn(llm, "a") == wanted != base.expected[None]
        assert drawn(llm, None) == base.expected[None]
    assert main(["merge-adapter", str(base.folder), base.adapters["a"], "--output", str(tmp_path / "merged")]) == 2


@pytest.mark.parametrize("device", some("cpu", "fake-static"))
def test_experts_in_one_batch(sparse: Base, device: str) -> None:
    check_batches(sparse, **DEVICES[device])


def test_every_kind_takes_turns_in_one_slot(dense: Base, sparse: Base) -> None:
    for base in (dense, sparse):
        check_batches(base, device="cpu", max_adapters=1)


def test_experts_of_a_quantized_base_draw_the_same_in_a_batch(sparse: Base) -> None:
    chosen = {name: sparse.adapters[name] for name in ("a1", "a3")}
    with sparse.opened(device="cpu", quantization="int8", adapters=chosen) as llm:
        alone = {name: drawn(llm, name) for name in (*chosen, None)}
        each = [*chosen, None] * 2
        assert drawn(llm, each) == [alone[name][number] for number, name in enumerate(each)]
        assert alone["a1"] != alone[None] != alone["a3"]


def test_a_merged_checkpoint_draws_what_magnitudes_and_embeddings_draw(dense: Base, tmp_path: Path) -> None:
    for name in ("a0", "a4"):
        merged = tmp_path / name
        assert main(["merge-adapter", str(dense.folder), dense.adapters[name], "--output", str(merged)]) == 0
        with LLM(str(merged), device="cpu", dtype="float32", skip_tokenizer=True, max_model_len=96) as llm:
            assert drawn(llm, None) == dense.expected[name]


def test_a_merged_checkpoint_draws_what_stacked_experts_draw(sparse: Base, tmp_path: Path) -> None:
    for name in ("a1", "a3"):
        merged = tmp_path / name
        assert main(["merge-adapter", str(sparse.folder), sparse.adapters[name], "--output", str(merged)]) == 0
        with LLM(str(merged), device="cpu", dtype="float32", skip_tokenizer=True, max_model_len=96) as llm:
            assert drawn(llm, None) == sparse.expected[name]


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj", "v_proj"], "use_dora": True}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
        (
            "qwen3-moe",
            {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        ),
        ("qwen3-moe", {"target_modules": [], "target_parameters": ["experts.down_proj"], "use_rslora": True}),
    ],
)
def test_what_peft_saves_draws_what_peft_merges(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = Base(family, tmp_path, {})
    torch.manual_seed(5)
    adapted = peft.get_peft_model(
        copy.deepcopy(base.model), peft.LoraConfig(r=8, lora_alpha=40, init_lora_weights=False, **settings)
    )
    adapted.save_pretrained(tmp_path / "a")
    merged = adapted.merge_and_unload()
    wanted = [greedy(merged, ids) for ids in PROMPTS]
    with base.opened(device="cpu", adapters={"a": str(tmp_path / "a")}) as llm:
        assert drawn(llm, "a") == wanted != base.expected[None]
        assert drawn(llm, None) == base.expected[None]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_slots_have_room_for_what_the_start_says(dense: Base) -> None:
    with dense.opened(device="cpu", adapters={}, max_adapters=1, max_adapter_rank=64) as llm:
        for name, target in (("a1", "embeddings"), ("a2", "head"), ("a3", "magnitudes")):
            with pytest.raises(AdapterRefused, match=f"--adapter-targets {target}"):
                llm.load_adapter(name, dense.adapters[name])
    targets = ("embeddings", "head", "magnitudes")
    with dense.opened(device="cpu", adapters={}, max_adapters=1, max_adapter_rank=64, adapter_targets=targets) as llm:
        for name in ("a1", "a2", "a4"):
            llm.load_adapter(name, dense.adapters[name])
            assert drawn(llm, name) == dense.expected[name]
    with pytest.raises(ConfigError, match="adapter_targets has 'expert'; known are products, experts"):
        EngineConfig(adapter_targets=("expert",))


def test_weights_of_another_base_beside_an_adapter_are_named(dense: Base, tmp_path: Path) -> None:
    folder = DENSE["a1"].save(dense.model, tmp_path / "a")
    held = load_file(folder / "adapter_model.safetensors")
    held["base_model.model.model.embed_tokens.base_layer.weight"][3] += 1
    save_file(held, folder / "adapter_model.safetensors")
    with (
        dense.opened(device="cpu", adapters={}, max_adapters=1, adapter_targets=("embeddings",)) as llm,
        pytest.raises(AdapterRefused, match=r"saved with a model.embed_tokens.weight that is not the model's"),
    ):
        llm.load_adapter("a", str(folder))


def test_magnitudes_need_plain_weights_under_them(dense: Base) -> None:
    with (
        dense.opened(
            device="cpu", quantization="int8", adapters={}, max_adapters=1, adapter_targets=("magnitudes",)
        ) as llm,
        pytest.raises(AdapterRefused, match="Quantized matrices, .* never have it: serve plain weights"),
    ):
        llm.load_adapter("a", dense.adapters["a3"])


def test_stacks_of_another_size_are_named(sparse: Base, tmp_path: Path) -> None:
    folder = SPARSE["a3"].save(sparse.model, tmp_path / "a")
    held = load_file(folder / "adapter_model.safetensors")
    name = next(key for key in held if key.endswith("0.mlp.experts.lora_A.weight"))
    held[name] = torch.ones(len(held[name]), 48)
    save_file(held, folder / "adapter_model.safetensors")
    with (
        sparse.opened(device="cpu", adapters={}, max_adapters=1, adapter_targets=("experts",)) as llm,
        pytest.raises(
            AdapterRefused, match="for experts of 64 rows and 48 columns; they have 64 rows and 64 columns or"
        ),
    ):
        llm.load_adapter("a", str(folder))
