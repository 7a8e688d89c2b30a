"""What LLM and AsyncLLM share of serving vectors: the task, and how texts become prompts of it."""

from __future__ import annotations

from pathlib import Path

from anychip.config import EngineConfig
from anychip.engine.vector_inputs import VectorInputs
from anychip.model_config import ModelConfig
from anychip.tasks.detect import resolved, served_task
from anychip.tasks.sentence_transformers import read_object
from anychip.tasks.served import ServedTask
from anychip.tokenizer.tokenizer import Tokenizer


def with_task(config: EngineConfig, model: ModelConfig) -> tuple[EngineConfig, ServedTask]:
    """The configuration for the checkpoint's task, and the task. Raises UserError or Unsupported."""
    served = served_task(config, model)
    return resolved(config, model, served), served


def vector_inputs(
    config: EngineConfig, model: ModelConfig, served: ServedTask, tokenizer: Tokenizer | None, max_length: int
) -> VectorInputs:
    """`max_length` is the engine's longest prompt."""
    folder = Path(config.tokenizer or model.folder)
    return VectorInputs(
        served,
        tokenizer,
        max_length=max_length,
        segments=int(model.get("type_vocab_size") or 0) > 1,
        cuts_left=read_object(folder / "tokenizer_config.json").get("truncation_side") == "left",
    )
