"""What layers ask of a checkpoint while they are built, in the names that they want."""

from __future__ import annotations

from anychip.errors import CheckpointError
from anychip.weights.checkpoint import Checkpoint
from anychip.weights.gguf_checkpoint import GGUFCheckpoint
from anychip.weights.register import WeightRegister

_LAYERS = "model.layers."


class StoredTensors:
    """`checkpoint` None: weights are made up. `head_drafts`: a head is built beside the model, of the layers behind
    those that config.json describes."""

    def __init__(
        self, checkpoint: Checkpoint | GGUFCheckpoint | None, register: WeightRegister, *, head_drafts: bool = False
    ) -> None:
        self._checkpoint = checkpoint
        self._register = register
        self._head_drafts = head_drafts

    def tie(self, head: str, embedding: str) -> bool:
        """Whether module `head` is to hold the weight of module `embedding`, where config.json ties them: False for a
        checkpoint that brings a head with values of its own, plain or quantized. Of a checkpoint that has the head
        alone, the head is the embedding too."""
        given = {self._register.place(name): name for name in self.names}
        weight, other = f"{head}.weight", f"{embedding}.weight"
        if any(name.startswith(f"{head}.") and name not in (weight, f"{head}.bias") for name in given):
            return False
        if weight not in given:
            return True
        if other not in given:
            self._register.aliases[weight] = other
            return True
        assert self._checkpoint is not None, "names come from a checkpoint"
        return self._checkpoint.same(given[weight], given[other])

    def leave_out_layers(self, first: int) -> None:
        """Tensors of layers `first` and on are not the model's: published checkpoints have layers that predict further
        tokens (MTP) behind those that config.json describes. A note says which."""
        indexes = {
            int(index)
            for name in map(self._register.place, self.names)
            if name.startswith(_LAYERS) and (index := name[len(_LAYERS) :].partition(".")[0]).isdigit()
        }
        further = sorted(index for index in indexes if index >= first)
        if further:
            self._register.elsewhere += tuple(f"{_LAYERS}{index}." for index in further)
        if further and not self._head_drafts:
            named = f"{'layer' if len(further) == 1 else 'layers'} {', '.join(map(str, further))}"
            self._register.notes += (
                f"the checkpoint has tensors of {named}, counted from 0, and config.json describes {first} layers: "
                "they are left out (such layers predict further tokens; --speculate mtp drafts with the first)",
            )

    def has(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is called so."""
        return any(self._register.place(stored) == name for stored in self.names)

    @property
    def names(self) -> frozenset[str]:
        """As the checkpoint gives them; none of one that is made up."""
        try:
            return frozenset() if self._checkpoint is None else self._checkpoint.names
        except CheckpointError:  # a plan needs config.json alone; a start reads the files, and says what is wrong
            return frozenset()
