"""Brings the ids that a pipeline's last stage draws back to its first one, which looks their embeddings up."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from anychip.layers.stage import Stage
from anychip.plugin_api import MAX_SENT, Communicator

_KEPT = MAX_SENT // 2
"""Steps whose ids the first stage leaves on their way where nobody needs them: fewer than the last one may send ahead,
and more than are in flight, so that older ones are there already."""


class ReturningIds:
    """One message a step that draws, in the order of the steps, between ranks that hold the same share of their layers:
    its drawn ids [num_samples] int32."""

    def __init__(self, stage: Stage, communicator: Communicator) -> None:
        self.stage = stage
        self._communicator = communicator
        self._due: deque[Tensor | None] = deque()  # by step: the slots that it draws for; None: it draws nothing

    def give(self, ids: Tensor) -> None:
        """The last stage has drawn a step's ids."""
        self._communicator.send(ids, 0)

    def expect(self, slots: Tensor) -> None:
        """The first stage has computed a step that draws for these slots [num_samples]."""
        self._due.append(slots.long() if len(slots) else None)

    def take_in(self, last_ids: Tensor, ids_behind: int) -> None:
        """Before the first stage computes a step whose StepDecision.ids_behind is given: writes the ids of the steps up
        to that one to `last_ids` [max_slots + 1], and waits for them."""
        left = ids_behind - 1 if ids_behind else _KEPT
        while len(self._due) > left:
            slots = self._due.popleft()
            if slots is not None:
                ids = self._communicator.recv(last_ids.new_empty(len(slots)), self.stage.count - 1)
                last_ids[slots] = ids
