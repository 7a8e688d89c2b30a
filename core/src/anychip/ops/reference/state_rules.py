"""What a recurrence's reference is: two forms that agree, over float32 tensors of plain shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

States = dict[str, Tensor]
"""Arrays by the names that the spec gives them."""
Given = Mapping[str, Tensor]


class Rule(Protocol):
    """Inputs, arrays and weights are named and shaped as plugin_api.RECURRENCES has them. Nothing given is changed."""

    def step(self, inputs: Given, states: States, weights: Given) -> tuple[Tensor, States]:
        """Recurrent form: one token of each of several sequences. Inputs [rows, ...], states [rows, ...] before it;
        returns the output [rows, ...], and the states after it."""
        ...

    def chunk(self, inputs: Given, first: States, weights: Given) -> tuple[Tensor, States]:
        """Chunked form: several tokens of one sequence. Inputs [num_tokens, ...], states without a leading dimension;
        returns the output [num_tokens, ...], and the states after the last token."""
        ...
