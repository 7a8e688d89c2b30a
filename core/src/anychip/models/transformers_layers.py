"""Our layers as torch modules, to stand where transformers' modelling code expects its own."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.embedding import LMHead, VocabParallelEmbedding
from anychip.layers.linear import ColumnParallelLinear, Projection, ReplicatedLinear, RowParallelLinear
from anychip.plugin_api import Sharded

QUERY_NAMES = ("q_proj", "query_key_value", "qkv_proj", "c_attn", "query")
"""Endings of the modules that make queries, in transformers' plans."""


class _Given(BaseModelOutputWithPastAndCrossAttentions):
    """Whatever else a head passes on, there is none."""

    def __getattr__(self, name: str) -> None:
        return None


class GivenHidden(nn.Module):
    """Stands for a decoder whose work is done: returns what it is given."""

    def forward(self, *ids: Any, inputs_embeds: Tensor, **others: Any) -> _Given:
        return _Given(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> GivenHidden:
        """Of heads that reach into a model for its decoder."""
        return self


class Embedding(nn.Module):
    def __init__(self, layer: VocabParallelEmbedding) -> None:
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        """For code that asks for its device or its dtype: of its rows, this rank's."""
        # Only a GGUF file's tied head takes it over, and no file of that kind is served through the library's code.
        assert self.layer.weight is not None
        return self.layer.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(ids.flatten()).view(*ids.shape, -1)


class Head(nn.Module):
    """`bias` [vocab_size], whole on every rank, where the library's head has one."""

    def __init__(self, layer: LMHead, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.layer = layer
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.layer(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1)
        return logits if self.bias is None else logits + self.bias


class TiedHead(nn.Module):
    """Over an embedding that transformers keeps: the same weight, whole on every rank."""

    def __init__(self, embedding: nn.Module, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._embedding = [embedding]  # in a list: its parameters are listed once, where they belong
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        weight: Tensor = self._embedding[0].weight  # type: ignore[assignment]
        return F.linear(hidden, weight, self.bias)


class ParallelLinear(nn.Module):
    """One of layers.linear's projections. `gather` makes every rank's output whole; `split` takes this rank's share
    of a whole input."""

    def __init__(
        self, builder: Builder, layer: ColumnParallelLinear | RowParallelLinear, *, gather: bool, split: bool
    ) -> None:
        super().__init__()
        self.layer = layer
        self.communicator = builder.mesh.axis("tp")
        self.gather, self.split = gather, split

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        if self.split:
            flat = flat.chunk(self.communicator.size, dim=-1)[self.communicator.rank].contiguous()
        result = self.layer(flat)
        if self.gather:
            result = self.communicator.all_gather(result)
        return result.view(*x.shape[:-1], -1)


def embedding(builder: Builder, name: str, module: nn.Embedding) -> Embedding:
    layer = VocabParallelEmbedding(
        builder, name=name, vocab_size=module.num_embeddings, hidden_size=module.embedding_dim
    )
    return Embedding(layer)


def head(builder: Builder, name: str, module: nn.Linear, tied: Embedding | None) -> Head:
    layer = LMHead(
        builder,
        name=name,
        vocab_size=module.out_features,
        hidden_size=module.in_features,
        tied=None if tied is None else tied.layer,
    )
    return Head(layer, module.bias)


def parallel_linear(builder: Builder, name: str, module: nn.Linear, style: str) -> ParallelLinear:
    """The module in a style of transformers' tensor-parallel plan. Raises Unsupported for one that is not known."""
    bias = module.bias is not None
    inputs, outputs = module.in_features, module.out_features
    layer: ColumnParallelLinear | RowParallelLinear
    if style == "replicated":
        layer = ReplicatedLinear(builder, name=name, in_features=inputs, out_features=outputs, bias=bias)
    elif style in ("colwise", "colwise_gather_output"):
        projection = Projection("all", name, outputs, (Sharded(dim=0),))
        layer = ColumnParallelLinear(builder, in_features=inputs, projections=[projection], bias=bias)
    elif style in ("rowwise", "rowwise_split_input"):
        layer = RowParallelLinear(
            builder, name=name, in_features=inputs, placed=(Sharded(dim=1),), out_features=outputs, bias=bias
        )
    else:
        raise Unsupported("transformers' tensor-parallel plan", [f"{name} has style {style!r}"])
    return ParallelLinear(builder, layer, gather=style.endswith("gather_output"), split=style.endswith("split_input"))
