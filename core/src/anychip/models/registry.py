"""Finds the family that builds a checkpoint's architecture."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from anychip.errors import ConfigError
from anychip.models.decoder import Decoder

NATIVE = {
    "LlamaForCausalLM": "anychip.models.llama:Llama",
    "Qwen3ForCausalLM": "anychip.models.qwen3:Qwen3",
    "Qwen3MoeForCausalLM": "anychip.models.qwen3_moe:Qwen3MoE",
    "Gemma2ForCausalLM": "anychip.models.gemma2:Gemma2",
}


def find_family(architecture: str, contributed: Mapping[str, str]) -> type[Decoder]:
    """`contributed` maps architectures to the dotted classes that plugins bring; core's own come first.

    Raises ConfigError for an architecture that nobody builds.
    """
    dotted = NATIVE.get(architecture) or contributed.get(architecture)
    if dotted is None:
        known = ", ".join(sorted({*NATIVE, *contributed}))
        raise ConfigError(f"architecture {architecture!r} is not supported; supported are {known}")
    module, _, name = dotted.partition(":")
    family: type[Decoder] = getattr(import_module(module), name)
    return family
