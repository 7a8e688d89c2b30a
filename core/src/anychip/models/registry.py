"""Finds the code that builds a checkpoint's architecture: a native family, a plugin's, or transformers' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from anychip.config import EngineConfig
from anychip.errors import ConfigError
from anychip.layers.build import Builder
from anychip.model_config import ModelConfig
from anychip.plugin_api import CacheSpec, MeshShape, StepModel
from anychip.registry.blame import imported
from anychip.types import DType

NATIVE = {
    "Gemma2ForCausalLM": "anychip.models.gemma2:Gemma2",
    "Gemma3ForCausalLM": "anychip.models.gemma3:Gemma3",
    "GptOssForCausalLM": "anychip.models.gpt_oss:GptOss",
    "GraniteForCausalLM": "anychip.models.granite:Granite",
    "LlamaForCausalLM": "anychip.models.llama:Llama",
    "MinistralForCausalLM": "anychip.models.mistral:Ministral",
    "MistralForCausalLM": "anychip.models.mistral:Mistral",
    "MixtralForCausalLM": "anychip.models.mixtral:Mixtral",
    "Phi3ForCausalLM": "anychip.models.phi3:Phi3",
    "Qwen2ForCausalLM": "anychip.models.qwen2:Qwen2",
    "Qwen3ForCausalLM": "anychip.models.qwen3:Qwen3",
    "Qwen3MoeForCausalLM": "anychip.models.qwen3_moe:Qwen3MoE",
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
    dotted = known.get(model.architecture)
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
    try:
        from anychip.models.transformers_family import transformers_family
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"architecture {model.architecture!r} has no native family, and transformers, whose code may run it, is "
            "not installed: pip install anychip[transformers]"
        ) from error
    return transformers_family(model, trust_remote_code=config.trust_remote_code)
