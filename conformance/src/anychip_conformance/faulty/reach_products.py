"""Faults of products, experts, other layers and ranks that are right up to a size, and wrong beyond it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anychip.ops.reference import DenseWeights, ExpertWeights, ReferenceEncoder, ReferenceLatent
from anychip.ops.reference.quantized import QuantizedMatrix
from anychip.plugin_api import BatchView, EncoderLayer, EncoderView, LatentLayer, Routing, StateView
from anychip_conformance.faulty.plain import InvariantMoE, PlainLinear
from anychip_conformance.faulty.products import FaultyQuantized, TakenForAnother, quantized_or_plain
from anychip_conformance.faulty.ranks import Wrapped
from anychip_conformance.faulty.recurrences import PlainRecurrence
from anychip_conformance.faulty.registry import fault
from anychip_conformance.faulty.states import PlainStates

_DENSE, _EXPERTS, _LATENT = "linear.reach.{:03}", "moe.reach.{:03}", "latent.reach.{:03}"
_STATE, _ENCODER = "state.reach.{:03}", "encoder.reach.{:03}"

# -- dense products ---------------------------------------------------------------------------------------------


@fault("linear-tokens-past-512", "linear", killed_by=_DENSE.format(1))
class TokensPast512(PlainLinear):
    """Tokens past the 512th come out as zeros."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        result = super().apply(x, packed, out=out)
        result[512:] = 0
        return result


@fault("linear-tile-rows-repeat", "linear", killed_by=_DENSE.format(2))
class TileRowsRepeat(PlainLinear):
    """A tile has 64 tokens. Of a second, partly filled one, the last token comes out as the tile's first."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        result = super().apply(x, packed, out=out)
        if len(x) > 65 and len(x) % 64:
            result[-1] = result[len(x) // 64 * 64 - 1]
        return result


@fault("linear-columns-past-16384", "linear", killed_by=_DENSE.format(3))
class ColumnsPast16384(PlainLinear):
    """One token's sums end at column 16,384."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        return super().apply(x if len(x) > 1 else _cut(x, 16_384), packed, out=out)


@fault("linear-columns-of-a-tile", "linear", killed_by=_DENSE.format(4))
class ColumnsOfATile(PlainLinear):
    """From 4,096 columns on, those that do not fill a tile of 32 are left out."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        return super().apply(x if x.shape[1] < 4096 else _cut(x, x.shape[1] // 32 * 32), packed, out=out)


@fault("linear-last-column", "linear", killed_by=_DENSE.format(3))
class LastColumn(PlainLinear):
    """Beyond 16,384 columns the last one is left out."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        return super().apply(x if x.shape[1] <= 16_384 else _cut(x, x.shape[1] - 1), packed, out=out)


def _cut(x: Tensor, columns: int) -> Tensor:
    kept = x.clone()
    kept[:, columns:] = 0
    return kept


@fault("linear-features-past-65536", "linear", killed_by=_DENSE.format(5))
class FeaturesPast65536(PlainLinear):
    """Features past the 65,536th come out as those 65,536 before them."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        result = super().apply(x, packed, out=out)
        beyond = max(0, result.shape[1] - 65_536)
        if beyond:
            result[:, 65_536 : 65_536 + beyond] = result[:, :beyond].clone()
        return result


@fault("linear-loads-65535-rows", "linear", killed_by=_DENSE.format(6))
class Loads65535Rows(PlainLinear):
    """The row at which a chunk is loaded is a number of 16 bits."""

    def load(self, packed: DenseWeights, part: str, tensor: Tensor, *, row: int = 0) -> None:
        super().load(packed, part, tensor, row=row & 0xFFFF)


@fault("linear-epilogue-past-32768", "linear", killed_by=_DENSE.format(9))
class EpiloguePast32768(PlainLinear):
    """Of more than 32,768 features, the activation leaves the last ones as zeros."""

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        result = super().apply(x, packed, out=out)
        if self.spec.epilogue is not None:
            result[:, 32_768:] = 0
        return result


@fault("linear-256th-call", "linear", killed_by="linear.calls.001")
class Call256(PlainLinear):
    """Every 256th product of a kernel is the one before, where that has as many tokens."""

    _calls = 0
    _kept: dict[int, Tensor]

    def apply(self, x: Tensor, packed: DenseWeights, *, out: Tensor | None = None) -> Tensor:
        self._calls += 1
        result = super().apply(x, packed, out=out)
        return result if self._calls % 256 else result.roll(1, -1)


# -- quantized products -----------------------------------------------------------------------------------------


class GroupsPast128(TakenForAnother):
    """Groups past the 128th have the scales of the first ones."""

    def taken_for(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        if matrix.scheme.scales != "group" or matrix.scales.shape[1] <= 128:
            return matrix
        return replace(matrix, scales=matrix.scales[:, torch.arange(matrix.scales.shape[1]) % 128])


class LastGroup(TakenForAnother):
    """A matrix of more than 1,024 groups has the scale of the last but one in its last group."""

    def taken_for(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        if matrix.scheme.scales != "group" or matrix.scales.shape[1] <= 1024:
            return matrix
        scales = matrix.scales.clone()
        scales[:, -1] = scales[:, -2]
        return replace(matrix, scales=scales)


class ChannelsPast4096(TakenForAnother):
    """Rows past the 4,096th have the scales of the first ones."""

    def taken_for(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        if matrix.scheme.scales != "channel":
            return matrix
        return replace(matrix, scales=matrix.scales[torch.arange(len(matrix.scales)) % 4096])


class TokensPast256(FaultyQuantized):
    """Tokens past the 256th come out as zeros."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        result = super().product(x, matrix)
        result[256:] = 0
        return result


class ColumnsPast32768(FaultyQuantized):
    """Products with a scale for each row sum over 32,768 columns."""

    def product(self, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        return super().product(_cut(x, 32_768) if matrix.scheme.scales == "channel" else x, matrix)


# The visits of a scheme follow each other: features, tokens, then columns or groups.
for _id, _number, _class in (
    ("linear-groups-past-128", 9, GroupsPast128),
    ("linear-last-group", 9, LastGroup),
    ("linear-channels-past-4096", 1, ChannelsPast4096),
    ("linear-quantized-tokens-past-256", 2, TokensPast256),
    ("linear-quantized-columns-past-32768", 3, ColumnsPast32768),
):
    fault(_id, "linear", killed_by=f"linear.reach_quantized.{_number:03}")(quantized_or_plain(_class))

# -- experts ----------------------------------------------------------------------------------------------------


@fault("moe-ids-in-a-signed-byte", "moe", killed_by=_EXPERTS.format(1))
class IdsInASignedByte(InvariantMoE):
    """Ids of experts are kept in a signed byte: those past the 128th are counted from the end."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        honest = super().route(router_logits, bias)
        return Routing(honest.weights, honest.expert_ids % 128)


@fault("moe-routes-256-experts", "moe", killed_by=_EXPERTS.format(1))
class Routes256Experts(InvariantMoE):
    """Experts past the 256th are never picked."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        logits = router_logits.clone()
        logits[:, 256:] = -30.0
        return super().route(logits, bias)


@fault("moe-eighth-choice", "moe", killed_by=_EXPERTS.format(3))
class EighthChoice(InvariantMoE):
    """Choices past the eighth weigh nothing."""

    def route(self, router_logits: Tensor, bias: Tensor | None = None) -> Routing:
        honest = super().route(router_logits, bias)
        weights = honest.weights.clone()
        weights[:, 8:] = 0
        return Routing(weights, honest.expert_ids)


class FaultyExperts(InvariantMoE):
    """Honest but for what is asked of `experts`."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        return self.changed(super().experts(x, self.routed(routing), packed, expert_map=expert_map))

    def routed(self, routing: Routing) -> Routing:
        return routing

    def changed(self, result: Tensor) -> Tensor:
        return result


@fault("moe-experts-past-128", "moe", killed_by=_EXPERTS.format(5))
class ExpertsPast128(FaultyExperts):
    """Experts past the 128th add nothing."""

    def routed(self, routing: Routing) -> Routing:
        return Routing(routing.weights.masked_fill(routing.expert_ids >= 128, 0), routing.expert_ids)


@fault("moe-experts-past-384", "moe", killed_by=_EXPERTS.format(5))
class ExpertsPast384(FaultyExperts):
    """Experts past the 384th are taken for those 384 before."""

    def routed(self, routing: Routing) -> Routing:
        return Routing(routing.weights, routing.expert_ids % 384)


@fault("moe-capacity", "moe", killed_by=_EXPERTS.format(8))
class Capacity(FaultyExperts):
    """An expert takes 256 tokens of a step; others that picked it are dropped."""

    def routed(self, routing: Routing) -> Routing:
        one_hot = torch.nn.functional.one_hot(routing.expert_ids, self.spec.num_experts).sum(dim=1)
        place = one_hot.cumsum(dim=0).gather(-1, routing.expert_ids)
        return Routing(routing.weights.masked_fill(place > 256, 0), routing.expert_ids)


@fault("moe-four-choices", "moe", killed_by=_EXPERTS.format(6))
class FourChoices(FaultyExperts):
    """A token's fifth expert and later ones are not run."""

    def routed(self, routing: Routing) -> Routing:
        return Routing(routing.weights[:, :4], routing.expert_ids[:, :4])


@fault("moe-tokens-past-2048", "moe", killed_by=_EXPERTS.format(7))
class TokensPast2048(FaultyExperts):
    """Tokens past the 2,048th come out as zeros."""

    def changed(self, result: Tensor) -> Tensor:
        result[2048:] = 0
        return result


@fault("moe-hidden-past-4096", "moe", killed_by=_EXPERTS.format(9))
class HiddenPast4096(FaultyExperts):
    """Of a hidden state, numbers past the 4,096th come out as zeros."""

    def changed(self, result: Tensor) -> Tensor:
        result[:, 4096:] = 0
        return result


@fault("moe-local-past-128", "moe", killed_by=_EXPERTS.format(12))
class LocalPast128(FaultyExperts):
    """Where only some experts are loaded, numbers of others are cut to seven bits, and meet those that are."""

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        if expert_map is not None and self.spec.num_experts > 128:
            expert_map = expert_map[torch.arange(len(expert_map)) % 128 + len(expert_map) - 128]
        return super().experts(x, routing, packed, expert_map=expert_map)


# -- other layers -----------------------------------------------------------------------------------------------


@fault("latent-rows-past-32768", "latent", killed_by=_LATENT.format(1))
class RowsPast32768(ReferenceLatent):
    """Pages behind 32,768 tokens are looked up from the table's beginning."""

    def plan(self, batch: BatchView, shape: Any, **rest: Any) -> Any:
        pages = torch.arange(batch.block_table.shape[1]) % (32_768 // batch.block_size)
        return super().plan(replace(batch, block_table=batch.block_table[:, pages]), shape, **rest)


class LatentResult(ReferenceLatent):
    """Honest, but for its result."""

    def forward(self, *given: Any, **rest: Any) -> Any:
        result, cache = super().forward(*given, **rest)
        return self.changed(result), cache

    def changed(self, result: Tensor) -> Tensor:
        raise NotImplementedError


@fault("latent-heads-past-64", "latent", killed_by=_LATENT.format(5))
class LatentHeadsPast64(LatentResult):
    """Heads past the 64th come out as those 64 before."""

    def changed(self, result: Tensor) -> Tensor:
        return result[:, torch.arange(result.shape[1]) % 64]


@fault("latent-tokens-past-256", "latent", killed_by=_LATENT.format(4))
class LatentTokensPast256(LatentResult):
    """Tokens past the 256th of a step come out as zeros."""

    def changed(self, result: Tensor) -> Tensor:
        result[256:] = 0
        return result


@fault("latent-numbers-past-256", "latent", killed_by=_LATENT.format(6))
class LatentNumbersPast256(ReferenceLatent):
    """Of a latent row, numbers past the 256th are written as zeros."""

    def write_rows(self, latent: Tensor, k_rope: Tensor, cache: Tensor, plan: BatchView, layer: LatentLayer) -> Tensor:
        latent = latent.clone()
        latent[..., 256:] = 0
        return super().write_rows(latent, k_rope, cache, plan, layer)


@fault("state-rows-past-256", "state", killed_by=_STATE.format(1))
class StateRowsPast256(PlainStates):
    """Rows past the 256th are in the state of the row 256 before."""

    def block(self, plan: StateView, row: int) -> int:
        return int(plan.state_blocks[row % 256])


@fault("state-chunk-past-512", "state", killed_by=_STATE.format(2))
class StateChunkPast512(PlainStates):
    """The state kept is that of a chunk's 512th token, where there are more."""

    def keep(self, sums: Tensor, block: int, found: Tensor, x: Tensor, gate: Tensor) -> None:
        sums[block] = found[:512][-1]


@fault("state-width-past-1024", "state", killed_by=_STATE.format(3))
class StateWidthPast1024(PlainStates):
    """Numbers past the 1,024th of a state are not kept."""

    def keep(self, sums: Tensor, block: int, found: Tensor, x: Tensor, gate: Tensor) -> None:
        sums[block, :1024] = found[-1, :1024]


@fault("state-recurrence-rows-past-64", "recurrence", killed_by=_STATE.format(4))
class RecurrenceRowsPast64(PlainRecurrence):
    """Rows past the 64th leave their states as they were."""

    def forward(self, inputs: Any, cache: Any, plan: StateView, layer: Any) -> Any:
        before = {name: array.clone() for name, array in cache.items()}
        result, cache = super().forward(inputs, cache, plan, layer)
        for block in plan.state_blocks[64:].tolist():
            for name, array in cache.items():
                array[block] = before[name][block]
        return result, cache


class EncoderResult(ReferenceEncoder):
    """Honest, but for its result."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        return self.changed(super().attend(q, k, v, plan, layer))

    def changed(self, result: Tensor) -> Tensor:
        raise NotImplementedError


@fault("encoder-heads-past-64", "encoder", killed_by=_ENCODER.format(4))
class EncoderHeadsPast64(EncoderResult):
    """Heads past the 64th come out as zeros."""

    def changed(self, result: Tensor) -> Tensor:
        result[:, 64:] = 0
        return result


@fault("encoder-tokens-past-1024", "encoder", killed_by=_ENCODER.format(1))
class EncoderTokensPast1024(EncoderResult):
    """Tokens past the 1,024th of a step come out as the token before them."""

    def changed(self, result: Tensor) -> Tensor:
        return result[torch.arange(len(result)).clamp(max=1023)]


@fault("encoder-rows-past-512", "encoder", killed_by=_ENCODER.format(3))
class EncoderRowsPast512(ReferenceEncoder):
    """Rows past the 512th are one sequence."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: EncoderView, layer: EncoderLayer) -> Tensor:
        lengths = plan.host_query_lens
        if len(lengths) > 512:
            joined = [*lengths[:512].tolist(), int(lengths[512:].sum())]
            plan = replace(plan, host_query_lens=type(lengths)((len(joined),), dtype=lengths.dtype))
            plan.host_query_lens[:] = joined
        return super().attend(q, k, v, plan, layer)


# -- ranks ------------------------------------------------------------------------------------------------------


@fault("comm-sum-past-64-kib", "communicator", killed_by="comm.reach.001")
class SumPast64KiB(Wrapped):
    """What is behind the first 64 KiB of a message is not summed."""

    def all_reduce(self, x: Tensor) -> Tensor:
        first = x.clone().flatten()
        most = 65_536 // x.element_size()
        total = self.inner.all_reduce(first.clone())
        first[:most] = total[:most]
        return first.view_as(x)


@fault("comm-gather-past-512-kib", "communicator", killed_by="comm.reach.002")
class GatherPast512KiB(Wrapped):
    """The buffer of a gather has 512 KiB for each rank: what is behind them is written over its beginning."""

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        most = 524_288 // x.element_size() // max(1, x[0].numel())
        if dim or len(x) <= most:
            return super().all_gather(x, dim)
        return super().all_gather(x[torch.arange(len(x)) % most], dim)


@fault("comm-broadcast-last-element", "communicator", killed_by="comm.reach.007")
class BroadcastLastElement(Wrapped):
    """Of messages whose bytes are no multiple of 64, and above 4,096, the last element stays."""

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        result = super().broadcast(x.clone(), root)
        if x.nbytes > 4096 and x.nbytes % 64:
            result.view(-1)[-1] = x.reshape(-1)[-1]
        return result


@fault("comm-three-ranks", "communicator", killed_by="comm.reach.009")
class ThreeRanks(Wrapped):
    """A tree of pairs leaves the third of three ranks out of the sum."""

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.size != 3:
            return super().all_reduce(x)
        return self.inner.all_reduce(x if self.rank < 2 else torch.zeros_like(x))


@fault("comm-256th-call", "communicator", killed_by="comm.calls.001")
class Comm256thCall(Wrapped):
    """Collectives are numbered in a byte; the 256th gives its own part alone."""

    _calls = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        self._calls += 2
        return super().all_reduce(x) if self._calls % 256 else x
