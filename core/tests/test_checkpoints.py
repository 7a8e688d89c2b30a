"""A checkpoint that does not fit says which tensor and which file; one that does is streamed, never held twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anychip import LLM, SamplingParams
from anychip.config import EngineConfig
from anychip.errors import CheckpointError, ConfigError, KVCacheTooSmall, Unsupported
from anychip.launch.plan import plan_engine
from anychip_conformance.equality.tiny_models import make_checkpoint

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_checkpoint("llama", folder)
    return folder


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(original, folder)
    return folder


def open_llm(folder: Path, **settings):
    return LLM(str(folder), **{"skip_tokenizer": True, "device": "cpu", "num_kv_blocks": 64, **settings})


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def tokens(folder: Path, **settings) -> list[int]:
    with open_llm(folder, **settings) as llm:
        return (
            llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))[0]
            .outputs[0]
            .token_ids
        )


NAME = "model.layers.2.mlp.up_proj.weight"


def test_a_missing_tensor_is_named(checkpoint):
    edit(checkpoint, lambda t: t.pop(NAME))
    with pytest.raises(CheckpointError, match=rf"lacks tensor '{NAME}' of shape \[128, 64\]"):
        open_llm(checkpoint)


def test_a_tensor_without_a_place_is_named_with_its_file(checkpoint):
    edit(checkpoint, lambda t: t.update({"model.extra.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=rf"'model.extra.weight' of .*{WEIGHTS} has no place"):
        open_llm(checkpoint)


def test_a_misshapen_tensor_is_named_with_both_shapes(checkpoint):
    edit(checkpoint, lambda t: t.update({NAME: torch.zeros(127, 64)}))
    with pytest.raises(CheckpointError, match=rf"'{NAME}' of .* has shape \[127, 64\], the model wants \[128, 64\]"):
        open_llm(checkpoint)


def test_a_pickle_is_refused(checkpoint):
    (checkpoint / WEIGHTS).rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin, a pickle"):
        open_llm(checkpoint)


def test_a_file_that_is_no_safetensors_is_refused(checkpoint):
    (checkpoint / WEIGHTS).write_bytes(b"not at all")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        open_llm(checkpoint)


def test_an_index_that_names_an_absent_file_is_refused(checkpoint):
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: "part-2.safetensors"}}))
    with pytest.raises(CheckpointError, match="names part-2.safetensors, which is not in"):
        open_llm(checkpoint)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_read_is_refused(checkpoint, content):
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="index.json is no index of a checkpoint"):
        open_llm(checkpoint)


def test_a_setting_that_the_family_needs_is_named(checkpoint):
    edit_config(checkpoint, architectures=["MixtralForCausalLM"])
    with pytest.raises(CheckpointError, match="config.json has no 'num_local_experts', which MixtralForCausalLM needs"):
        open_llm(checkpoint)


def test_a_checkpoint_in_several_files_gives_the_same_tokens(checkpoint, original):
    tensors = load_file(checkpoint / WEIGHTS)
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, mine in halves.items():
        save_file({name: tensors[name] for name in mine}, checkpoint / file)
    (checkpoint / WEIGHTS).unlink()
    weight_map = {name: file for file, mine in halves.items() for name in mine}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert tokens(checkpoint) == tokens(original)


def test_dummy_weights_need_no_file_and_are_the_same_every_time(checkpoint):
    (checkpoint / WEIGHTS).unlink()
    first = tokens(checkpoint, load_format="dummy", dtype="float32")
    assert first == tokens(checkpoint, load_format="dummy", dtype="float32")


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        (
            {"architectures": ["MysteryForCausalLM"]},
            ConfigError,
            "'MysteryForCausalLM' has no native family and transformers [0-9.]+ does not implement it",
        ),
        ({"architectures": []}, CheckpointError, "names no architecture"),
        ({"hidden_size": "wide"}, CheckpointError, "holds a value that cannot be: .*'wide'"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, Unsupported, "rope_type 'spiral'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, CheckpointError, "have no 'factor'"),
    ],
)
def test_a_model_that_nobody_builds_is_refused(checkpoint, change, error, expected):
    edit_config(checkpoint, **change)
    with pytest.raises(error, match=expected):
        open_llm(checkpoint)


def test_a_cache_too_small_for_one_request_says_what_fits(checkpoint):
    with pytest.raises(KVCacheTooSmall, match="one request of 512 tokens needs 32 KV blocks, 9 fit.* 144"):
        open_llm(checkpoint, max_model_len=512, num_kv_blocks=10)


def test_without_a_length_the_model_gets_what_fits(checkpoint):
    with open_llm(checkpoint, num_kv_blocks=10) as llm:
        assert llm.engine.max_model_len == 144


def test_a_dtype_that_the_device_lacks_is_refused(checkpoint):
    with pytest.raises(
        ConfigError, match="float16 .* not among those of cpu: bfloat16 is nearest; available: bfloat16"
    ):
        open_llm(checkpoint, dtype="float16")


def test_a_block_size_that_the_backend_lacks_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="block_size 24 is not among .*: 16 is nearest; .*set --block-size"):
        open_llm(checkpoint, block_size=24)


def test_tensor_parallelism_that_does_not_divide_the_heads_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="4 attention heads do not split evenly over 3 ranks"):
        plan_engine(EngineConfig(model=str(checkpoint), device="cpu", tensor_parallel_size=3))
