"""anychip: serve large language models on any accelerator.

`from anychip import LLM, SamplingParams` is the embedding developer's whole import. LLM loads torch, so the
names here are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anychip.config import EngineConfig
    from anychip.engine.embedded_prompt import EmbeddedPrompt, EmbeddedSpan
    from anychip.launch.llm import LLM
    from anychip.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "EmbeddedPrompt", "EmbeddedSpan", "EngineConfig", "SamplingParams"]

_HOMES = {
    "LLM": "anychip.launch.llm",
    "EmbeddedPrompt": "anychip.engine.embedded_prompt",
    "EmbeddedSpan": "anychip.engine.embedded_prompt",
    "EngineConfig": "anychip.config",
    "SamplingParams": "anychip.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'anychip' has no attribute {name!r}")
