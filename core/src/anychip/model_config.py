"""Translates a checkpoint's config.json, or a GGUF file's metadata, into anychip's terms. Builds no layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from anychip.config_names import with_common_names
from anychip.errors import CheckpointError
from anychip.family_defaults import FAMILY_DEFAULTS, base_architecture, first_position, with_defaults
from anychip.gguf.config import config_of, generation_of
from anychip.gguf.model import is_gguf, read_model
from anychip.hub import resolve_folder
from anychip.text_parts import DECODERS, decoder_of


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`raw` is config.json with the family's defaults. Settings that only one family reads stay there. `folder` is the
    checkpoint's, or a GGUF file."""

    folder: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    sampling_defaults: dict[str, float]
    """What generation_config.json recommends, in SamplingParams' names."""
    raw: dict[str, Any]
    part_of: str | None = None
    """The architecture of a checkpoint that holds more than this decoder."""

    def get(self, key: str, default: Any = None) -> Any:
        """A family's own key."""
        return self.raw.get(key, default)

    @property
    def most_positions(self) -> int:
        """Those that may be asked for: a dynamic rotary embedding stretches beyond max_positions, by its factor."""
        rope = _rope_parameters(self.raw)
        if (rope.get("rope_type") or rope.get("type")) != "dynamic":
            return self.max_positions
        return int(self.max_positions * float(rope.get("factor", 1.0)))

    def need(self, key: str) -> Any:
        """A family's own key that it cannot do without. Raises CheckpointError."""
        if self.raw.get(key) is None:
            raise CheckpointError(f"{self.folder}/config.json has no {key!r}, which {self.architecture} needs")
        return self.raw[key]


def load_model_config(model: str) -> ModelConfig:
    """From config.json and generation_config.json, or a GGUF file. Raises ConfigError or CheckpointError."""
    folder = resolve_folder(model)
    source = folder / "config.json"
    if is_gguf(folder):
        file = read_model(folder)
        source, raw, generation = folder, config_of(file), generation_of(file.metadata)
    else:
        raw = read_json(source, required=True)
        generation = read_json(folder / "generation_config.json", required=False)
    architectures = raw.get("architectures") or []
    if not architectures:
        raise CheckpointError(f'{source} names no architecture; add "architectures": [...]')
    whole, raw = architectures[0], decoder_of(architectures[0], raw)
    architecture = DECODERS.get(whole, whole)
    if base_architecture(architecture) not in FAMILY_DEFAULTS:
        raw = with_common_names(raw)
    raw = with_defaults(architecture, raw)
    try:
        num_heads = _num_heads(architecture, raw)
        return ModelConfig(
            folder=str(folder),
            architecture=architecture,
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            num_layers=_num_layers(raw),
            num_heads=num_heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // max(1, num_heads)),
            intermediate_size=int(_intermediate_size(architecture, raw)),
            max_positions=int(raw["max_position_embeddings"]) - first_position(architecture, raw),
            norm_eps=float(raw.get("rms_norm_eps") or 1e-6),
            rope_theta=float(_rope_parameters(raw).get("rope_theta") or raw.get("rope_theta", 10000.0)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
            eos_token_ids=_ids(generation.get("eos_token_id", raw.get("eos_token_id"))),
            sampling_defaults={
                name: generation[name] for name in _RECOMMENDED if isinstance(generation.get(name), int | float)
            },
            raw=raw,
            part_of=whole if architecture != whole else None,
        )
    except KeyError as missing:
        raise CheckpointError(f"{source} has no {missing}") from missing
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source} holds a value that cannot be: {error}") from error


_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _num_heads(architecture: str, raw: dict[str, Any]) -> int:
    """Of families of states alone 0; of any other at least 1."""
    count = int(raw["num_attention_heads"])
    if count < 1 and FAMILY_DEFAULTS.get(base_architecture(architecture), {}).get("num_attention_heads") != 0:
        raise ValueError(f"num_attention_heads is {count}")
    return count


def _num_layers(raw: dict[str, Any]) -> int:
    """Given, or as many as have a kind: hybrids may leave it out."""
    kinds = raw.get("layer_types") or raw.get("layers_block_type")
    return int(raw["num_hidden_layers"] if "num_hidden_layers" in raw or not kinds else len(kinds))


def _intermediate_size(architecture: str, raw: dict[str, Any]) -> Any:
    """Native families must give it: no default would suit a model of another size."""
    if base_architecture(architecture) in FAMILY_DEFAULTS:
        return raw["intermediate_size"]
    size = raw.get("intermediate_size") or 4 * raw["hidden_size"]
    return max(size) if isinstance(size, list) else size  # one of each layer


def _rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings: `rope_parameters` since transformers 5, `rope_scaling` before. If both are given, transformers
    takes the older name, and so does this."""
    return raw.get("rope_scaling") or raw.get("rope_parameters") or {}


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """The checkpoint's rotary settings; {} for plain rotary embeddings."""
    return _rope_parameters(config.raw)


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def read_json(path: Path, *, required: bool) -> dict[str, Any]:
    """A checkpoint's settings; {} where there are none and none are `required`. Raises CheckpointError."""
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path} is missing; a checkpoint needs its config.json")
        return {}
    try:
        content = json.loads(path.read_bytes())  # takes Infinity, which the library writes for time_step_limit
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object")
    return content
