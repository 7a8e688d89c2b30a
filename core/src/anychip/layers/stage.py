"""A stage of the pipeline: which of a model's layers a rank holds, and how hidden states come to it and leave it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anychip.types import DType

if TYPE_CHECKING:
    from anychip.plugin_api import Communicator


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Stages hold neighbouring layers, the first stage the first ones. WHOLE holds all of a model."""

    index: int = 0
    count: int = 1
    first_layer: int = 0
    end_layer: int | None = None
    """Behind the stage's last layer; None: it is the model's last."""

    @property
    def is_first(self) -> bool:
        """Whether it looks embeddings up."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the final norm and the head, and draws."""
        return self.index == self.count - 1

    def layers(self, num_layers: int) -> range:
        """Those that it holds of a model of so many."""
        return range(self.first_layer, num_layers if self.end_layer is None else self.end_layer)

    def described(self, num_layers: int, token_bytes: int) -> str:
        """For people: what it holds, and what its links carry. `token_bytes` are those of a token's stream."""
        layers = self.layers(num_layers)
        holds = f"layers {layers.start} to {layers.stop - 1} of {num_layers}"
        holds += ", the embedding" * self.is_first + ", the final norm and the head" * self.is_last
        carried = [] if self.is_last else [f"{token_bytes} B a token to stage {self.index + 2}"]
        carried += ["4 B a drawn token to stage 1"] if self.is_last else []
        return f"stage {self.index + 1} of {self.count} holds {holds}; a step sends {', '.join(carried)}"

    def held_elsewhere(self, num_layers: int, *, embedding: bool) -> tuple[str, ...]:
        """Beginnings of the names of a decoder's tensors that other stages hold, in checkpoints of the whole model and
        of its decoder alone. `embedding`: whether this one holds the embedding."""
        own = self.layers(num_layers)
        names = [f"layers.{index}." for index in range(num_layers) if index not in own]
        names += [] if embedding else ["embed_tokens."]
        names += [] if self.is_last else ["norm."]
        heads = () if self.is_last else ("lm_head.", "score.")
        return (*names, *(f"model.{name}" for name in names), *heads)


WHOLE = Stage()


class StageLinks:
    """What passes between stages is the residual stream [num_tokens, hidden_size]: one tensor a step, of the model's
    dtype, between ranks that hold the same share of their layers. `communicator` lies along the axis pp."""

    def __init__(self, stage: Stage, communicator: Communicator, hidden_size: int, dtype: DType) -> None:
        self.stage = stage
        self._communicator = communicator
        self._hidden_size = hidden_size
        self._dtype: torch.dtype = getattr(torch, dtype)

    def receive(self, positions: Tensor) -> Tensor:
        """The stream behind the stage before, of a step with these positions [num_tokens]. Waits for it."""
        stream = positions.new_empty((len(positions), self._hidden_size), dtype=self._dtype)
        return self._communicator.recv(stream, self.stage.index - 1)

    def pass_on(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """Adds a layer's output to the stream, and sends it to the next stage. Returns the stream."""
        stream = hidden if residual is None else hidden + residual
        self._communicator.send(stream, self.stage.index + 1)
        return stream
