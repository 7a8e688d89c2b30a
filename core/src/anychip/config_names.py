"""Names under which classes of transformers write what others write under the common name, in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model", "emb_dim", "dim", "embedding_dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "decoder_layers", "num_decoder_layers", "num_layers"),
    "num_attention_heads": (
        *("n_head", "n_heads", "decoder_attention_heads", "num_decoder_attention_heads", "attention_heads"),
        "num_heads",
    ),
    "num_key_value_heads": ("num_kv_heads",),
    "head_dim": ("kv_channels", "dim_head"),
    "vocab_size": ("n_words", "n_token"),
    "max_position_embeddings": (
        *("n_positions", "max_seq_len", "model_max_length", "max_target_positions", "n_ctx", "seq_length"),
        "context_length",
    ),
}
"""What a class's attribute_map says, by the common name. The first that is there counts."""

UNBOUNDED = 2048
"""Positions of a class whose config.json gives no number, such as BLOOM's: it was trained on so many."""


def with_common_names(document: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the common names too."""
    named = dict(document)
    for name, others in OTHER_NAMES.items():
        given = next((document[other] for other in others if document.get(other) is not None), None)
        if named.get(name) is None and given is not None:
            named[name] = given
    named.setdefault("max_position_embeddings", UNBOUNDED)
    return named
