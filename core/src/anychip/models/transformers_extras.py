"""What a step asks of the library's model beyond the final hidden states of its tokens, by the library's own means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from anychip.errors import Unsupported
from anychip.plugin_api import FINAL, ForwardExtras


def arguments(base: Any, input_ids: Tensor, extras: ForwardExtras | None) -> dict[str, Any]:
    """How the library's model is called for tokens [num_tokens]: with ids, or with embeddings. Raises Unsupported for
    positions by axis."""
    ids = input_ids.unsqueeze(0)
    if extras is None:
        return {"input_ids": ids}
    if extras.rope_positions is not None:
        raise Unsupported(f"{type(base).__name__} through transformers", ["positions by axis"])
    shows = {"output_hidden_states": bool(extras.tap_layers)}
    if extras.embedding_rows is None:
        return {"input_ids": ids, **shows}
    return {"inputs_embeds": extras.embedded(base.get_input_embeddings()(ids)[0]).unsqueeze(0), **shows}


def show(base: Any, extras: ForwardExtras, states: Sequence[Tensor], final: Tensor, *, last: int) -> None:
    """Taps of layers 0 to `last`. The library shows what each layer reads, `states`, and the last one's output behind
    the final norm only. Raises Unsupported where it is wanted before the norm."""
    if last in extras.tap_layers:
        raise Unsupported(
            f"{type(base).__name__} through transformers",
            [f"hidden states behind its last layer, {last}, before the final norm"],
        )
    for layer, state in enumerate(states[1:-1]):
        extras.seen(layer, state[0])
    extras.seen(FINAL, final)
