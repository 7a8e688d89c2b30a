"""What heads that draft have in common: what they borrow of their target, and which tokens they can draft."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.errors import CheckpointError, ConfigError
from anychip.layers.build import Builder
from anychip.plugin_api import StepModel, WeightView


@dataclass(frozen=True, slots=True)
class TargetParts:
    """What a head borrows of its target. They are functions, so that whoever counts the head's tensors does not find
    the target's."""

    embed: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, target: StepModel) -> TargetParts:
        """Raises ConfigError for a model whose embedding cannot be told apart."""
        embedding = getattr(target, "embedding", None)
        if embedding is None:
            raise ConfigError(
                f"--speculate: {type(target).__name__} has no embedding that a head could read; heads need a model of "
                "a native family"
            )
        return cls(embedding.__call__, target.logits)


def drafted_ids(builder: Builder, name: str, num_rows: int, vocab_size: int, *, are_offsets: bool) -> Tensor:
    """The token that each row of a head's output stands for, [num_rows]: by the checkpoint's tensor `name`, which has
    ids, or how far the id lies behind the row's number. It is filled as weights are loaded."""
    ids = builder.platform.empty((num_rows,), "int64", "weights")

    def take(view: WeightView) -> None:
        given = view.read((0, num_rows)).long()
        if are_offsets:
            given = given + torch.arange(num_rows)
        if not 0 <= int(given.min()) <= int(given.max()) < vocab_size:
            raise CheckpointError(
                f"{view.source} names tokens {int(given.min())} to {int(given.max())}, and the vocabulary has "
                f"{vocab_size}"
            )
        ids.copy_(given)

    builder.weights.want(name, (num_rows,), take)
    return ids
