"""What config.json names of a decoder's layers: activations, and kinds of attention. An unknown one is refused."""

from __future__ import annotations

from anychip.errors import CheckpointError, Unsupported
from anychip.model_config import ModelConfig
from anychip.plugin_api import Activation

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""By transformers' names."""


def known_activation(config: ModelConfig, field: str, default: str) -> Activation:
    """What config.json names in a field. Raises Unsupported for one that no kernel has."""
    name = config.get(field, default)
    if name not in _ACTIVATIONS:
        raise Unsupported(config.architecture, [f"{field} {name!r}; known are {', '.join(_ACTIVATIONS)}"])
    return _ACTIVATIONS[name]


def given_layer_types(config: ModelConfig) -> list[str] | None:
    """config.json's layer_types, for families that read them. Raises Unsupported for an unknown kind of attention, and
    CheckpointError if their number is not that of the layers."""
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    unknown = sorted({*kinds} - {"full_attention", "sliding_attention"})
    if unknown:
        reason = f"layer_types {', '.join(unknown)}; known are full_attention and sliding_attention"
        raise Unsupported(config.architecture, [reason])
    if len(kinds) != config.num_layers:
        raise CheckpointError(
            f"{config.folder}/config.json has {len(kinds)} layer_types and {config.num_layers} num_hidden_layers"
        )
    return list(kinds)
