"""What a head's config.json says: a few layers that draft tokens from a model's hidden states. Reads no tensor.

EAGLE-1: arXiv 2401.15077. EAGLE-3: arXiv 2503.01840. Medusa: arXiv 2401.10774.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from anychip.errors import CheckpointError, ConfigError
from anychip.hub import resolve_folder
from anychip.model_config import ModelConfig, load_model_config, read_json
from anychip.plugin_api import FINAL

_EAGLE_1 = ("LlamaForCausalLM", "LlamaForCausalLMEagle", "EagleLlamaForCausalLM")
_EAGLE_3 = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
"""Architectures, by the names that training frameworks write."""

_MEDUSA = "MedusaModel"

_UNKNOWN = ("norm_before_residual", "norm_before_fc", "norm_output")
"""Keys of layouts that nothing here builds."""


class HeadConfig(msgspec.Struct, frozen=True, kw_only=True):
    kind: Literal["EAGLE-1", "EAGLE-3", "MTP"]
    model: ModelConfig
    """Of the head's own layers; of a head within the target's checkpoint, the target's with the head's layers behind
    its own."""
    taps: tuple[int, ...]
    """The target's layers behind which the head reads hidden states, as StepLimits names them."""
    num_draft_tokens: int
    """Rows of the head's own output: tokens that it can draft."""
    layer: int = 0
    """Of a head within the target's checkpoint: which of the layers it is."""


def load_head_config(source: str, target: ModelConfig) -> HeadConfig:
    """A head for `target`. Raises ConfigError, which names both sides of what does not fit, and CheckpointError for a
    folder that cannot be read."""
    head = load_model_config(source)
    kind = _kind(head)
    reads = head.get("target_hidden_size") or head.hidden_size
    for size in (reads, head.hidden_size):
        _check_sizes("eagle", head.folder, size, head.vocab_size, target)
    if kind == "EAGLE-3" and head.num_layers != 1:
        raise ConfigError(f"--speculate eagle: {head.folder} has {head.num_layers} layers, and an EAGLE-3 head has one")
    unknown = [key for key in _UNKNOWN if head.get(key)]
    if unknown:
        raise ConfigError(f"--speculate eagle: {head.folder} has {unknown[0]}, a layout that is not implemented")
    taps = _taps(head, target) if kind == "EAGLE-3" else (FINAL,)
    # Heads are trained on texts of a few thousand tokens, and attend by distance: they go as far as the target does.
    longer = msgspec.structs.replace(head, max_positions=target.max_positions)
    drafts = int(head.get("draft_vocab_size") or head.vocab_size)
    return HeadConfig(kind=kind, model=longer, taps=taps, num_draft_tokens=drafts)


class MedusaConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Heads that guess the next tokens but one from the final hidden state alone, each another one."""

    folder: str
    num_heads: int
    num_layers: int
    """Of each head."""
    num_draft_tokens: int
    """Rows of the heads' own outputs: tokens that they can draft."""
    own_outputs: bool
    """False: the target's output layer reads what they make."""


def load_medusa_config(source: str, target: ModelConfig) -> MedusaConfig:
    """Heads for `target`, as vLLM's converter writes them. Raises as load_head_config."""
    folder = resolve_folder(source)
    raw = read_json(folder / "config.json", required=True)
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture != _MEDUSA:
        raise ConfigError(
            f"--speculate medusa: {folder} has the architecture {architecture}, which is none that is read here; "
            f"there is {_MEDUSA}"
        )
    try:
        _check_sizes("medusa", str(folder), int(raw["hidden_size"]), int(raw["vocab_size"]), target)
        found = MedusaConfig(
            folder=str(folder),
            num_heads=int(raw["num_heads"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_draft_tokens=int(raw.get("truncated_vocab_size") or raw["vocab_size"]),
            own_outputs=not raw.get("original_lm_head", False),
        )
    except KeyError as missing:
        raise CheckpointError(f"{folder}/config.json has no {missing}") from missing
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json holds a value that cannot be: {error}") from error
    if found.num_heads < 1:
        raise ConfigError(f"--speculate medusa: {folder} has {found.num_heads} heads; expected 1 or more")
    return found


def _kind(head: ModelConfig) -> Literal["EAGLE-1", "EAGLE-3"]:
    if head.architecture in _EAGLE_3:
        return "EAGLE-3"
    if head.architecture in _EAGLE_1:  # some EAGLE-3 heads name no architecture of their own
        return "EAGLE-3" if head.get("draft_vocab_size") else "EAGLE-1"
    raise ConfigError(
        f"--speculate eagle: {head.folder} has the architecture {head.architecture}, which is no head that is read "
        f"here; there are EAGLE-3 ({', '.join(_EAGLE_3)}) and EAGLE-1 ({', '.join(_EAGLE_1)})"
    )


def _check_sizes(kind: str, folder: str, hidden_size: int, vocab_size: int, target: ModelConfig) -> None:
    if hidden_size != target.hidden_size:
        raise ConfigError(
            f"--speculate {kind}: the head {folder} is for hidden states of {hidden_size} elements, and the target "
            f"{target.folder} has {target.hidden_size}; use a head that was trained for this model"
        )
    if vocab_size != target.vocab_size:
        raise ConfigError(
            f"--speculate {kind}: the head {folder} has a vocabulary of {vocab_size} tokens, and the target "
            f"{target.folder} has {target.vocab_size}; use a head that was trained for this model"
        )


def _taps(head: ModelConfig, target: ModelConfig) -> tuple[int, ...]:
    """By default what goes into layers 2, n / 2 and n - 3. Where the config names layers, in `eagle_config` it means
    what comes out of them, and beside it what goes into them: that is how the frameworks that write them read them."""
    count, place = target.num_layers, "by default"
    taps = [1, count // 2 - 1, count - 4]
    nested = head.get("eagle_config")
    behind = nested.get("eagle_aux_hidden_state_layer_ids") if isinstance(nested, dict) else None
    before = head.get("eagle_aux_hidden_state_layer_ids")
    if behind or before:
        place = "by eagle_aux_hidden_state_layer_ids"
        taps = _ids(head, behind) if behind else [layer - 1 for layer in _ids(head, before)]
    wrong = [layer for layer in taps if not 0 <= layer < count]
    if wrong:
        raise ConfigError(
            f"--speculate eagle: the head {head.folder} reads hidden states behind layers {taps} ({place}), and the "
            f"target {target.folder} has layers 0 to {count - 1}; use a head that was trained for this model"
        )
    return tuple(taps)


def _ids(head: ModelConfig, given: Any) -> list[int]:
    if not isinstance(given, list) or not all(type(layer) is int for layer in given):
        raise ConfigError(
            f"--speculate eagle: {head.folder}/config.json has eagle_aux_hidden_state_layer_ids {given!r}, expected a "
            "list of layers"
        )
    return given
