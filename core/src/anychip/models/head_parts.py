"""What heads that draft have in common: what they borrow of their target, what they read of it, and which tokens they
can draft."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.errors import CheckpointError, ConfigError
from anychip.layers.build import Builder
from anychip.plugin_api import ForwardContext, ForwardExtras, StepModel, WeightView

OWN_TAP = 0
"""The layer of a following head's own tap: the feature of a position, for the guess behind it."""


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


class HeadFamily:
    """models.registry.ModelFamily of heads. `target` is there once the target is built: a head that is only measured
    needs none."""

    target: TargetParts | None = None


class FollowingHead:
    """A head that runs behind every step of its target (docs/decisions/0051). A StepModel whose steps have embedding
    rows, one for each token: the token's feature. It shows the feature of the guess behind a position as its tap."""

    def __init__(self, *, vocab_size: int, hidden_size: int, num_layers: int, borrowed: TargetParts | None) -> None:
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        self._borrowed = borrowed

    @property
    def borrowed(self) -> TargetParts:
        assert self._borrowed is not None, "the head was built without its target, to be measured alone"
        return self._borrowed

    def join(self, taps: Sequence[Tensor]) -> Tensor:
        """The target's hidden states by tap, [num_tokens, hidden_size] each, to features of the same shape."""
        return taps[0]

    def embed(self, ids: Tensor) -> Tensor:
        return self.borrowed.embed(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.borrowed.logits(hidden)


def extras_of(context: ForwardContext) -> ForwardExtras:
    assert context.extras is not None, "a head's steps have a feature for each token"
    return context.extras


def features_of(extras: ForwardExtras, like: Tensor) -> Tensor:
    """[num_tokens, hidden_size], in the dtype of `like`. Padded tokens have the buffer's first row."""
    rows, buffer = extras.embedding_rows, extras.embeddings
    assert rows is not None and buffer is not None, "a head's steps have a feature for each token"
    return buffer[rows.clamp(min=0)].to(like.dtype)


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
