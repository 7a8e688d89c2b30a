"""Checkpoints that hold a text decoder beside other models, such as one that sees: which part is the decoder, and what
its tensors are called alone. The other parts are left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DECODERS: Mapping[str, str] = {
    "Qwen3_5ForConditionalGeneration": "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3_5MoeForCausalLM",
}
"""By the whole's architecture, that of its decoder."""

OTHER_PARTS = ("model.visual.", "visual.")
"""Beginnings of names that are not the decoder's."""

_PREFIXES = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", ""))


def decoder_of(architecture: str, document: dict[str, Any]) -> dict[str, Any]:
    """config.json of the decoder alone: its own settings before those of the whole. The whole says whether the head is
    tied, as transformers has it. A config.json of a plain decoder stays as it is."""
    if architecture not in DECODERS:
        return document
    text = {name: value for name, value in document.get("text_config", {}).items() if name != "architectures"}
    own = {name: value for name, value in document.items() if not name.endswith("_config")}
    found = {**own, **text}
    if "tie_word_embeddings" in document:
        found["tie_word_embeddings"] = document["tie_word_embeddings"]
    if quantization := document.get("quantization_config"):
        found["quantization_config"] = _renamed(quantization)
    return found


def decoder_name(name: str) -> str:
    """A tensor's name as the decoder alone has it."""
    for theirs, ours in _PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _renamed(setting: Any) -> Any:
    """Quantization settings list modules by name."""
    if isinstance(setting, dict):
        return {decoder_name(key): _renamed(value) for key, value in setting.items()}
    if isinstance(setting, list):
        return [_renamed(value) for value in setting]
    return decoder_name(setting) if isinstance(setting, str) else setting
