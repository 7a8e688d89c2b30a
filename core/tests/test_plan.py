"""What `anychip plan` predicts is what the engine then reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3MoeConfig

from anychip import LLM, EngineConfig
from anychip.entrypoints.cli.main import main
from anychip.errors import ConfigError
from anychip.launch.plan import plan_engine
from anychip.plugin_api import MemoryInfo
from anychip.worker_report import MemoryPlan
from anychip_conformance.equality.quantized_models import make_quantized_checkpoint
from anychip_cpu.platform import CpuPlatform

_SIZES = {"vocab_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048}
CONFIGS = {
    "llama": LlamaConfig(**_SIZES, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, dtype="bfloat16"),
    "qwen2": Qwen2Config(
        **_SIZES, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, tie_word_embeddings=True,
        dtype="float32",
    ),
    "qwen3-moe": Qwen3MoeConfig(
        **_SIZES, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_experts=16, num_experts_per_tok=4,
        moe_intermediate_size=256, head_dim=32, dtype="bfloat16",
    ),
}  # fmt: skip
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3-moe": "Qwen3MoeForCausalLM"}


def config_folder(name: str, folder: Path) -> str:
    """A model that is its config.json."""
    document = CONFIGS[name].to_dict() | {"architectures": [ARCHITECTURES[name]]}
    (folder / "config.json").write_text(json.dumps(document))
    return str(folder)


def together(memory: MemoryPlan) -> int:
    return memory.weights + memory.activations + memory.graphs + memory.kv_cache


@pytest.mark.parametrize("quantization", [None, "int4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_prediction_is_what_the_engine_reports(name, quantization, tmp_path):
    settings = {"device": "cpu", "load_format": "dummy", "quantization": quantization, "skip_tokenizer": True}
    model = config_folder(name, tmp_path)
    plan = plan_engine(EngineConfig(model=model, **settings))
    with LLM(model, **settings) as llm:
        real, length = llm.worker.memory, llm.engine.max_model_len
    predicted = plan.worker.memory
    assert predicted.weights == real.weights
    assert predicted.num_blocks == pytest.approx(real.num_blocks, rel=0.05)
    assert together(predicted) == pytest.approx(together(real), rel=0.05)
    assert plan.max_model_len == length


def test_a_quantized_checkpoint_is_planned_from_its_headers(tmp_path):
    make_quantized_checkpoint("gptq", tmp_path)
    plan = plan_engine(EngineConfig(model=str(tmp_path), device="cpu", num_kv_blocks=64))
    with LLM(str(tmp_path), device="cpu", num_kv_blocks=64, skip_tokenizer=True) as llm:
        assert llm.worker.memory.weights == plan.worker.memory.weights
    assert plan.quantization == "gptq"


def test_one_rank_of_two_is_planned_alone(tmp_path):
    model = config_folder("llama", tmp_path)
    settings = {"device": "cpu", "load_format": "dummy", "skip_tokenizer": True, "num_kv_blocks": 64}
    plan = plan_engine(EngineConfig(model=model, tensor_parallel_size=2, **settings))
    with LLM(model, tensor_parallel_size=2, **settings) as llm:
        assert llm.worker.memory.weights == plan.worker.memory.weights
    assert plan.num_devices == 2


@pytest.mark.parametrize("hosts", [{"nodes": ("a", "b"), "cluster_key": "k"}, {"executor": "ray"}])
def test_ranks_on_other_hosts_are_planned_as_if_they_were_here(tmp_path, hosts):
    model = config_folder("llama", tmp_path)
    settings = {"device": "cpu", "load_format": "dummy", "num_kv_blocks": 64, "tensor_parallel_size": 2}
    spread, here = (plan_engine(EngineConfig(model=model, **settings, **more)) for more in (hosts, {}))
    assert (spread.worker.memory.weights, spread.num_devices) == (here.worker.memory.weights, 2)


def test_a_model_of_the_step_seam_has_its_weights_planned(tmp_path):
    plan = plan_engine(
        EngineConfig(
            model=config_folder("qwen2", tmp_path), device="fake-static", load_format="dummy", num_kv_blocks=99
        )
    )
    assert plan.worker.memory.weights > 0
    assert any("step program" in note for note in plan.worker.notes)


def test_weights_beyond_the_devices_memory_are_refused(tmp_path):
    model = config_folder("llama", tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    huge = document | {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 200, "head_dim": 2048}
    (tmp_path / "config.json").write_text(json.dumps(huge))
    with pytest.raises(
        ConfigError, match="the weights take [0-9.]+ GiB on each of cpu's devices and [0-9.]+ GiB are free"
    ):
        plan_engine(EngineConfig(model=model, device="cpu", load_format="dummy"))


def test_a_start_without_the_memory_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    model = config_folder("llama", tmp_path)
    monkeypatch.setattr(CpuPlatform, "memory", lambda self, device: MemoryInfo(free=1000, total=1 << 40))
    monkeypatch.setattr("anychip.worker.model_source.load_weights", None)
    with pytest.raises(ConfigError, match="the weights take .* are free: .* GiB are missing"):
        LLM(model, device="cpu", load_format="dummy", skip_tokenizer=True)


def test_the_command_prints_every_line(tmp_path, capsys):
    model = config_folder("llama", tmp_path)
    assert main(["plan", model, "--device", "cpu", "--load-format", "dummy"]) == 0
    printed = capsys.readouterr().out
    for word in ("weights", "activations", "graphs", "KV cache", "together", "context", "concurrency"):
        assert word in printed
