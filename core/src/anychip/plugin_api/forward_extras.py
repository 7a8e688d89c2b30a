"""What a step asks of a model beyond the final hidden states of its tokens: taps, embeddings, three-axis positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anychip.plugin_api.ops import Rope

if TYPE_CHECKING:
    from torch import Tensor

FINAL = -1
"""The layer number that stands for the hidden states behind the final norm."""


@dataclass(frozen=True, slots=True)
class Turning:
    """A rotary table with a row for each token of a step, and each token's row: what Ops.qkv_norm_rope takes."""

    positions: Tensor  # [num_tokens]
    rope: Rope


@dataclass(slots=True, kw_only=True)
class ForwardExtras:
    """One step's, made by the program and given to the model in ForwardContext. A model calls `embedded` on what its
    first layer is to read and `seen` behind each layer and the final norm; ForwardContext.attend does the rest."""

    tap_layers: Sequence[int] = ()
    tap_tokens: Tensor | None = None  # [num_tokens]
    taps: dict[int, Tensor] = field(default_factory=dict)
    """By layer, [num_tokens, hidden_size] in the model's dtype: the hidden states of `tap_tokens`."""
    embedding_rows: Tensor | None = None  # [num_tokens]
    embeddings: Tensor | None = None  # [max_embeddings, hidden_size] float32
    rope_positions: Tensor | None = None  # [NUM_AXES, num_tokens]
    segments: Tensor | None = None  # [num_tokens] int32
    """Which text of its row's pair a token belongs to."""
    turnings: dict[int, Turning] = field(default_factory=dict)
    """Of ropes that layers have used already, by identity."""

    @classmethod
    def of(
        cls, fields: Mapping[str, Tensor], *, tap_layers: Sequence[int], embeddings: Tensor | None
    ) -> ForwardExtras | None:
        """By the arrays that a step has, on the device; None where it has none of these features."""
        tapped, rows, axes = (fields.get(name) for name in ("tap_tokens", "embedding_rows", "rope_positions"))
        segments = fields.get("segments")
        if tapped is None and rows is None and axes is None and segments is None:
            return None
        return cls(
            tap_layers=() if tapped is None else tap_layers,
            tap_tokens=tapped,
            embedding_rows=rows,
            embeddings=embeddings,
            rope_positions=axes,
            segments=segments,
        )

    def embedded(self, hidden: Tensor) -> Tensor:
        """Token embeddings [num_tokens, hidden_size] with rows of the buffer where the step has them."""
        rows = self.embedding_rows
        if rows is None or self.embeddings is None:
            return hidden
        given = self.embeddings[rows.clamp(min=0)].to(hidden.dtype)
        return given.where((rows >= 0).unsqueeze(-1), hidden)

    def seen(self, layer: int, hidden: Tensor, residual: Tensor | None = None) -> None:
        """What a layer hands on, its output before the residual sum and the residual apart where they are."""
        if layer in self.tap_layers:
            states = hidden if self.tap_tokens is None else hidden[self.tap_tokens]
            if residual is not None:
                states = states + (residual if self.tap_tokens is None else residual[self.tap_tokens])
            self.taps[layer] = states

    def turning(self, rope: Rope) -> Turning | None:
        """How the step's tokens turn; None: by BatchView.positions, as ever."""
        positions, axes = self.rope_positions, rope.axes
        if positions is None or axes is None:
            return None
        found = self.turnings.get(id(rope))
        if found is None:
            num_tokens = positions.shape[1]
            by_axis = axes.expand(1, num_tokens, -1)
            own = Rope(
                cos=rope.cos[positions].gather(0, by_axis)[0],
                sin=rope.sin[positions].gather(0, by_axis)[0],
                rotary_dim=rope.rotary_dim,
                interleaved=rope.interleaved,
            )
            places = positions.new_ones(num_tokens).cumsum(0) - 1
            found = self.turnings[id(rope)] = Turning(places, own)
        return found

    def tapped(self) -> list[Tensor]:
        """In the order of `tap_layers`."""
        return [self.taps[layer] for layer in self.tap_layers]
