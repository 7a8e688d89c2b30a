"""Token embedding and output head, split over ranks by vocabulary; tied where the checkpoint ties them."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from anychip.errors import ConfigError
from anychip.layers.adapted import adapted, embedded
from anychip.layers.build import Builder
from anychip.plugin_api import (
    AdaptedPart,
    AdapterSite,
    LinearPart,
    LinearSpec,
    QuantScheme,
    Sharded,
    Span,
    StepAdapters,
    WeightView,
)
from anychip.weights.matrix import Matrix, stream

AT_LOAD = QuantScheme(values="int8", scales="channel")
"""Of heads that are quantized as they are loaded; rows past the vocabulary are made for no other."""

VOCABULARY = (Sharded(dim=0, uneven="pad"),)
"""Ranks hold equally many rows; the last one's tail may lie past the vocabulary."""


class VocabParallelEmbedding:
    """[num_tokens] ids to [num_tokens, hidden_size]. `weight` None: rows are those of a quantized head. `site`: where
    adapters of the embedding go; every rank holds them whole."""

    placed_tensors = MappingProxyType({"weight": VOCABULARY})

    def __init__(self, builder: Builder, *, name: str, vocab_size: int, hidden_size: int, adapts: bool = False) -> None:
        self.name = name
        self.ops = builder.ops
        self.communicator = builder.mesh.axis("tp")
        self.share, _ = builder.held((vocab_size, hidden_size), VOCABULARY, "tokens")
        self.weight: Tensor | None = builder.platform.empty((self.share.count, hidden_size), builder.dtype, "weights")
        self._head: LMHead | None = None
        self.site: AdapterSite | None = None
        if adapts and builder.takes("embeddings"):
            everything = Span(0, hidden_size)
            self.site = builder.add_site(
                in_features=vocab_size,
                columns=Span(0, vocab_size),
                out_features=hidden_size,
                parts=(AdaptedPart(module=name, rows=hidden_size, held=everything, offset=0),),
                dtype=builder.dtype,
                kind="embedding",
            )

        def take(view: WeightView) -> None:
            if (weight := self.weight) is None:
                return
            held = self.share.within(vocab_size)
            weight[held.count :].zero_()

            def put(rows: Tensor, first: int) -> None:
                weight[first : first + len(rows)].copy_(rows)

            stream(view, held, Span(0, hidden_size), put)

        builder.weights.want(f"{name}.weight", (vocab_size, hidden_size), take)

    def read_from(self, head: LMHead) -> None:
        """Gives up its own storage, before anything is loaded."""
        self.weight, self._head = None, head

    def __call__(self, ids: Tensor, adapters: StepAdapters | None = None) -> Tensor:
        if self._head is not None:
            rows = self._head.kernel.rows(self._head.packed, ids - self.share.start)
        else:
            assert self.weight is not None
            rows = self.ops.embedding(ids=ids, weight=self.weight, first=self.share.start)
        return embedded(self.ops, self.site, ids, self.communicator.all_reduce(rows), adapters)


class LMHead:
    """Hidden states [num_rows, hidden_size] to logits [num_rows, vocab_size], gathered on every rank.

    Tied, the kernel adopts the embedding's storage, and packs a copy only where its layout needs one, or where the head
    is quantized as it is loaded. Where the embedding is stored quantized, the head holds it, and the embedding reads
    its rows there if the kernel can. A checkpoint that ties them and yet brings a head with other values is believed:
    its head is used.
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
        self.ops = builder.ops
        self.communicator = builder.mesh.axis("tp")
        share, _ = builder.held((vocab_size, hidden_size), VOCABULARY, "tokens")
        held = share.within(vocab_size)
        if tied is not None and not builder.stored.tie(name, tied.name):
            tied = None
        formats = builder.formats.for_head()
        scheme = formats.scheme(name, hidden_size)
        if scheme is not None and scheme != AT_LOAD and vocab_size % self.communicator.size:
            raise ConfigError(
                f"{name} is stored as {scheme.name} by {scheme.scales}, and its {vocab_size} rows do not split evenly "
                f"{self.communicator.size} ways; choose another tensor_parallel_size"
            )
        parts = [LinearPart(name="all", offset=0, rows=held.count, placed=VOCABULARY)]
        if held.count < share.count:
            parts.append(LinearPart(name="tail", offset=held.count, rows=share.count - held.count))
        self.kernel = builder.platform.linear(
            LinearSpec(
                in_features=hidden_size,
                out_features=share.count,
                parts=tuple(parts),
                dtype=builder.dtype,
                scheme=scheme,
            )
        )
        self.site = self._site(builder, name, hidden_size, share.count, held) if builder.takes("head") else None
        builder.weights.finishers.append(self._finish)
        if tied is not None:
            builder.weights.ignored += (f"{name}.weight",)
        self.adopted = tied.weight if tied is not None and scheme is None else None
        if self.adopted is not None:
            return
        self.packed = self.kernel.begin()
        if tied is not None and scheme != AT_LOAD and self.kernel.reads_rows:
            tied.read_from(self)
        formats.want(
            builder.weights,
            Matrix(
                name=name if tied is None else tied.name,
                shape=(vocab_size, hidden_size),
                rows=held,
                columns=Span(0, hidden_size),
                scheme=scheme,
                put=self._put,
            ),
        )

    def _site(self, builder: Builder, name: str, hidden_size: int, rows: int, held: Span) -> AdapterSite:
        """Where adapters of the head go; rows past the vocabulary have none."""
        return builder.add_site(
            in_features=hidden_size,
            columns=Span(0, hidden_size),
            out_features=rows,
            parts=(AdaptedPart(module=name, rows=self.vocab_size, held=held, offset=0),),
            dtype=builder.dtype,
            gains=builder.takes("magnitudes") and self.kernel.spec.scheme is None,
        )

    def _put(self, kind: str, tensor: Tensor, row: int = 0) -> None:
        self.kernel.load(self.packed, f"all.{kind}" if kind else "all", tensor, row=row)

    def _finish(self) -> None:
        if self.adopted is not None:
            self.packed = self.kernel.adopt(self.adopted)
            return
        for part in self.kernel.spec.parts[1:]:  # logits of no token, which nobody reads: any finite number serves
            shape = (part.rows, self.kernel.spec.in_features)
            scheme = self.kernel.spec.scheme
            self.kernel.load(self.packed, part.name, torch.zeros(shape, dtype=torch.int8 if scheme else None))
            if scheme:
                self.kernel.load(self.packed, f"{part.name}.scale", torch.ones(part.rows))
        self.packed = self.kernel.finish(self.packed)

    def __call__(self, hidden: Tensor, adapters: StepAdapters | None = None) -> Tensor:
        own = adapted(self.ops, self.site, hidden, self.kernel.apply(hidden, self.packed), adapters)
        logits = self.communicator.all_gather(own)
        return logits[:, : self.vocab_size]
