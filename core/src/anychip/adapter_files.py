"""Folders of adapters in PEFT's form: which files count, what the configuration says, and what identifies the content.
Reads no tensor, and needs no torch.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint (adapter_config.json, adapter_model.safetensors).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from anychip.config import ADAPTER_TARGETS, LEAST_ADAPTER_RANK, EngineConfig
from anychip.errors import AdapterRefused

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "*.bin", "*.pt", "*.pth")
_PIECE_BYTES = 4 << 20
_MOST_HEADER_BYTES = 100 << 20

_NOT_SERVED = {
    "lora_bias": "biases in adapters (lora_bias)",
    "fan_in_fan_out": "matrices that are stored transposed (fan_in_fan_out)",
    "modules_to_save": "modules that are trained and saved whole (modules_to_save)",
    "layer_replication": "layers that are used several times (layer_replication)",
    "trainable_token_indices": "trained token embeddings (trainable_token_indices)",
    "alora_invocation_tokens": "adapters that begin at a token (alora_invocation_tokens)",
    "use_qalora": "QALoRA (use_qalora)",
    "use_bdlora": "BD-LoRA (use_bdlora)",
    "kasa_config": "KaSA (kasa_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "arrow_config": "routing between adapters (arrow_config)",
}
"""Fields of adapter_config.json that change what an adapter means."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Values of init_lora_weights under which training began from other base weights than the model's."""


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A folder that has both files. Raises AdapterRefused where it has not."""

    path: Path

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise AdapterRefused(f"adapter {self.path} is not a folder; give one that PEFT's save_pretrained wrote")
        if not self.config.is_file():
            raise AdapterRefused(f"{self.path} has no {CONFIG}; give a folder that PEFT's save_pretrained wrote")
        if not self.weights.is_file():
            pickles = sorted({found.name for pattern in _PICKLES for found in self.path.glob(pattern)})
            why = (
                f"{pickles[0]} is a pickle, which can run code when it is read; save the adapter with "
                "save_pretrained(..., safe_serialization=True)"
                if pickles
                else "save the adapter with PEFT's save_pretrained"
            )
            raise AdapterRefused(f"{self.path} has no {WEIGHTS}; {why}")

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    def digest(self) -> bytes:
        """What identifies the adapter, whatever it is called: SHA-256 over its configuration and its weights."""
        _, raw = read_adapter_config(self.config)
        with self.weights.open("rb") as file:
            return digest_of(raw, iter(lambda: file.read(_PIECE_BYTES), b""))


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What adapter_config.json says of ranks and scales. Patterns are regular expressions over the end of a module's
    name, as PEFT reads them; the first that matches counts."""

    r: int
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}

    def rank_of(self, module: str) -> int:
        return _matching(self.rank_pattern, module, self.r)

    def scale_of(self, module: str) -> float:
        """alpha / rank, or with rsLoRA (arXiv 2312.03732) alpha / sqrt(rank)."""
        alpha, rank = _matching(self.alpha_pattern, module, self.lora_alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def largest_rank(self) -> int:
        return max(self.r, *self.rank_pattern.values(), 1)


T = TypeVar("T")


def _matching(patterns: dict[str, T], module: str, default: T) -> T:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_adapter_config(path: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """What it says, and all of it as it is written. Raises AdapterRefused for what is not served."""
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise AdapterRefused(f"{path} is no JSON object: {error}") from error
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise AdapterRefused(f"{path} has peft_type {str(kind)[:40]!r}; LORA is served")
    reasons = [what for field, what in _NOT_SERVED.items() if raw.get(field)]
    if raw.get("bias", "none") != "none":
        reasons.append(f"biases that were trained with the adapter (bias {str(raw['bias'])[:40]!r})")
    start = str(raw.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGES_BASE):
        reasons.append(
            f"an adapter that belongs to changed base weights (init_lora_weights {start!r}; PEFT's save_pretrained "
            "converts it with path_initial_model_for_weight_conversion)"
        )
    if reasons:
        raise AdapterRefused(f"{path} asks for {', and '.join(reasons)}; that is not served")
    present = {name: raw[name] for name in AdapterConfig.__struct_fields__ if raw.get(name) is not None}
    try:
        config = msgspec.convert(present, AdapterConfig)
        for pattern in (*config.rank_pattern, *config.alpha_pattern):
            re.compile(pattern)
    except (msgspec.ValidationError, re.error) as error:
        raise AdapterRefused(f"{path} holds a value that cannot be: {error}") from error
    if min(config.r, *config.rank_pattern.values(), config.r) < 1:
        raise AdapterRefused(f"{path} has a rank below 1")
    return config, raw


def digest_of(config: dict[str, Any], weights: Iterable[bytes | bytearray]) -> bytes:
    """SHA-256 over the configuration in one spelling, its length, and the bytes of the weights' file."""
    spelled = msgspec.json.encode(config, order="deterministic")
    digest = hashlib.sha256(len(spelled).to_bytes(8, "little") + spelled)
    for piece in weights:
        digest.update(piece)
    return digest.digest()


_TARGETS = {
    ".experts.": "experts",
    ".lora_embedding_": "embeddings",
    ".lm_head.lora_": "head",
    ".lora_magnitude_vector": "magnitudes",
}
"""By a part of a tensor's name, which of config.ADAPTER_TARGETS it changes; any other changes products."""


def targets_of(names: Iterable[str]) -> frozenset[str]:
    """What an adapter with tensors of these names changes beyond products."""
    return frozenset(target for name in names for part, target in _TARGETS.items() if part in f".{name}")


def with_room(config: EngineConfig) -> EngineConfig:
    """The configuration with room for what its adapters are, where nobody says how much: their ranks, and what they
    change. Raises AdapterRefused for a folder that is no adapter's."""
    if not config.adapters or None not in (config.max_adapter_rank, config.adapter_targets):
        return config
    folders = [AdapterFolder(Path(folder)) for folder in config.adapters.values()]
    rank, targets = config.max_adapter_rank, config.adapter_targets
    if rank is None:
        ranks = [read_adapter_config(folder.config)[0].largest_rank for folder in folders]
        rank = max(LEAST_ADAPTER_RANK, *ranks)
    if targets is None:
        changed = targets_of(name for folder in folders for name in _tensor_names(folder.weights))
        targets = tuple(target for target in ADAPTER_TARGETS if target == "products" or target in changed)
    return msgspec.structs.replace(config, max_adapter_rank=rank, adapter_targets=targets)


def _tensor_names(path: Path) -> list[str]:
    """From a safetensors file's header. Raises AdapterRefused for a file without a whole one."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > min(_MOST_HEADER_BYTES, path.stat().st_size):
                raise msgspec.DecodeError(f"it would take {length} bytes")
            return list(msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw]))
        except msgspec.MsgspecError as error:
            raise AdapterRefused(f"{path} is not a readable safetensors file: its header: {error}") from error
