"""Token embedding and output head, split over ranks by vocabulary; tied where the checkpoint ties them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from anychip.layers.build import Builder, Span
from anychip.plugin_api import LinearPart, LinearSpec, WeightView
from anychip.types import cdiv


def vocabulary_share(builder: Builder, vocab_size: int) -> Span:
    """This rank's tokens. Ranks hold equally many rows; the last one's tail may lie past the vocabulary."""
    rows = cdiv(vocab_size, builder.shard.size)
    return Span(builder.shard.rank * rows, rows)


class VocabParallelEmbedding:
    """[num_tokens] ids to [num_tokens, hidden_size]."""

    def __init__(self, builder: Builder, *, name: str, vocab_size: int, hidden_size: int) -> None:
        self.ops = builder.ops
        self.communicator = builder.shard.communicator
        self.share = vocabulary_share(builder, vocab_size)
        self.weight = builder.platform.empty((self.share.count, hidden_size), builder.dtype, "weights")

        def load(view: WeightView) -> None:
            self.weight.copy_(read_share(self.share, vocab_size, hidden_size, view))

        builder.weights.want(f"{name}.weight", (vocab_size, hidden_size), load)

    def __call__(self, ids: Tensor) -> Tensor:
        return self.communicator.all_reduce(self.ops.embedding(ids=ids, weight=self.weight, first=self.share.start))


def read_share(share: Span, vocab_size: int, hidden_size: int, view: WeightView) -> Tensor:
    """A vocabulary share's rows [share.count, hidden_size]; rows past the vocabulary are zeros."""
    start, stop = min(share.start, vocab_size), min(share.start + share.count, vocab_size)
    rows = view.read((start, stop), (0, hidden_size))
    return rows if stop - start == share.count else F.pad(rows, (0, 0, 0, share.count - (stop - start)))


class LMHead:
    """Hidden states [num_rows, hidden_size] to logits [num_rows, vocab_size], gathered on every rank.

    Tied, the kernel adopts the embedding's storage, and packs a copy only where its layout needs one.
    """

    def __init__(
        self,
        builder: Builder,
        *,
        name: str,
        vocab_size: int,
        hidden_size: int,
        tied: VocabParallelEmbedding | None,
    ) -> None:
        self.vocab_size = vocab_size
        self.communicator = builder.shard.communicator
        share = vocabulary_share(builder, vocab_size)
        self.kernel = builder.platform.linear(
            LinearSpec(
                in_features=hidden_size,
                out_features=share.count,
                parts=(LinearPart(name="all", offset=0, rows=share.count),),
                dtype=builder.dtype,
            )
        )
        self.tied = tied
        if tied is not None:
            builder.weights.finishers.append(self._finish)
            builder.weights.ignored += (f"{name}.weight",)
            return
        self.packed = self.kernel.begin()

        def load(view: WeightView) -> None:
            self.kernel.load(self.packed, "all", read_share(share, vocab_size, hidden_size, view))

        builder.weights.want(f"{name}.weight", (vocab_size, hidden_size), load)
        builder.weights.finishers.append(self._finish)

    def _finish(self) -> None:
        if self.tied is not None:
            self.packed = self.kernel.adopt(self.tied.weight)
        else:
            self.packed = self.kernel.finish(self.packed)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.communicator.all_gather(self.kernel.apply(hidden, self.packed))
        return logits[:, : self.vocab_size]
