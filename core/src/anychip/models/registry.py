"""Finds the code that builds a checkpoint's architecture: a native family, a plugin's, or transformers' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from anychip.config import EngineConfig
from anychip.errors import ConfigError
from anychip.family_defaults import base_architecture
from anychip.gguf.model import is_gguf
from anychip.layers.build import Builder
from anychip.model_config import ModelConfig
from anychip.plugin_api import CacheSpec, MeshShape, StepModel
from anychip.registry.blame import imported
from anychip.types import DType

NATIVE = {
    "BambaForCausalLM": "anychip.models.bamba:Bamba",
    "BertModel": "anychip.models.bert:Bert",
    "DeepseekV2ForCausalLM": "anychip.models.deepseek:DeepseekV2",
    "DeepseekV3ForCausalLM": "anychip.models.deepseek:DeepseekV3",
    "DeepseekV32ForCausalLM": "anychip.models.deepseek_sparse:DeepseekV32",
    "DistilBertModel": "anychip.models.distilbert:DistilBert",
    "Dots1ForCausalLM": "anychip.models.dots1:Dots1",
    "Ernie4_5ForCausalLM": "anychip.models.ernie4_5:Ernie45",
    "Ernie4_5_MoeForCausalLM": "anychip.models.ernie4_5:Ernie45MoE",
    "FalconH1ForCausalLM": "anychip.models.falcon_h1:FalconH1",
    "Gemma2ForCausalLM": "anychip.models.gemma2:Gemma2",
    "Gemma3ForCausalLM": "anychip.models.gemma3:Gemma3",
    "Gemma3TextModel": "anychip.models.gemma3_encoder:EmbeddingGemma",
    "GlmMoeDsaForCausalLM": "anychip.models.deepseek_sparse:GlmMoeDsa",
    "Glm4MoeLiteForCausalLM": "anychip.models.deepseek:DeepseekV3",
    "Glm4MoeForCausalLM": "anychip.models.glm4_moe:Glm4MoE",
    "GptOssForCausalLM": "anychip.models.gpt_oss:GptOss",
    "GraniteForCausalLM": "anychip.models.granite:Granite",
    "GraniteMoeForCausalLM": "anychip.models.granite_moe:GraniteMoE",
    "GraniteMoeHybridForCausalLM": "anychip.models.granite_hybrid:GraniteHybrid",
    "JambaForCausalLM": "anychip.models.jamba:Jamba",
    "KimiLinearForCausalLM": "anychip.models.kimi_linear:KimiLinear",
    "Lfm2MoeForCausalLM": "anychip.models.lfm2:Lfm2MoE",
    "Lfm2ForCausalLM": "anychip.models.lfm2:Lfm2",
    "LlamaForCausalLM": "anychip.models.llama:Llama",
    "Mamba2ForCausalLM": "anychip.models.mamba2:Mamba2LM",
    "MambaForCausalLM": "anychip.models.mamba:MambaLM",
    "MiniMaxForCausalLM": "anychip.models.minimax:MiniMax",
    "MiniMaxM2ForCausalLM": "anychip.models.minimax_m2:MiniMaxM2",
    "MinistralForCausalLM": "anychip.models.mistral:Ministral",
    "MistralForCausalLM": "anychip.models.mistral:Mistral",
    "MixtralForCausalLM": "anychip.models.mixtral:Mixtral",
    "ModernBertModel": "anychip.models.modernbert:ModernBert",
    "MPNetModel": "anychip.models.mpnet:MPNet",
    "NemotronHForCausalLM": "anychip.models.nemotron_h:NemotronH",
    "NomicBertModel": "anychip.models.nomic_bert:NomicBert",
    "OlmoeForCausalLM": "anychip.models.olmoe:Olmoe",
    "Phi3ForCausalLM": "anychip.models.phi3:Phi3",
    "Qwen2ForCausalLM": "anychip.models.qwen2:Qwen2",
    "Qwen2MoeForCausalLM": "anychip.models.qwen2_moe:Qwen2MoE",
    "Qwen3_5ForCausalLM": "anychip.models.qwen3_5:Qwen35",
    "Qwen3_5MoeForCausalLM": "anychip.models.qwen3_5:Qwen35MoE",
    "Qwen3ForCausalLM": "anychip.models.qwen3:Qwen3",
    "Qwen3MoeForCausalLM": "anychip.models.qwen3_moe:Qwen3MoE",
    "Qwen3NextForCausalLM": "anychip.models.qwen3_next:Qwen3Next",
    "RobertaModel": "anychip.models.bert:Roberta",
    "SeedOssForCausalLM": "anychip.models.seed_oss:SeedOss",
    "Starcoder2ForCausalLM": "anychip.models.starcoder2:Starcoder2",
    "XLMRobertaModel": "anychip.models.bert:Roberta",
    "Zamba2ForCausalLM": "anychip.models.zamba2:Zamba2",
}


class ModelFamily(Protocol):
    """A class that builds models: models.decoder.Decoder's subclasses, and what plugins bring."""

    def attention_specs(
        self, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType
    ) -> Sequence[CacheSpec]:
        """By layer, for one rank of a mesh. A layer that keeps two caches counts as two."""
        ...

    def __call__(self, config: ModelConfig, builder: Builder, specs: Sequence[Any]) -> StepModel: ...


def find_family(model: ModelConfig, config: EngineConfig, contributed: Mapping[str, str]) -> ModelFamily:
    """`contributed` maps architectures to the dotted classes that plugins bring; core's own come first.

    Raises ConfigError for an architecture that nobody builds, or not in the way that model_impl asks for.
    """
    known = {**contributed, **NATIVE}
    dotted = known.get(model.architecture) or known.get(base_architecture(model.architecture))
    if dotted is None and config.model_impl == "native":
        raise ConfigError(
            f"architecture {model.architecture!r} has no native family; there are {', '.join(sorted(known))}; "
            "--model-impl auto tries transformers' code"
        )
    if dotted is None or config.model_impl == "transformers":
        return _through_transformers(model, config)
    family: ModelFamily = imported(dotted)
    return family


def _through_transformers(model: ModelConfig, config: EngineConfig) -> ModelFamily:
    if is_gguf(Path(model.folder)):
        raise ConfigError(f"--model-impl transformers: native families alone serve GGUF files such as {model.folder}")
    try:
        from anychip.models.transformers_family import transformers_family
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"architecture {model.architecture!r} has no native family, and transformers, whose code may run it, is "
            "not installed: pip install anychip[transformers]"
        ) from error
    return transformers_family(model, trust_remote_code=config.trust_remote_code)
