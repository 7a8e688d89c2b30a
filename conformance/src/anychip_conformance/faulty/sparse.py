"""Faults of sparse latent attention: what is chosen, and what is attended to."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from anychip.ops.reference import SparseLatent
from anychip.plugin_api import IndexInputs, LatentLayer, Rope
from anychip_conformance.faulty.registry import fault


def _scores(queries: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    scores = torch.einsum("qhd,kd->qhk", queries.float(), keys.float()).relu()
    return torch.einsum("qhk,qh->qk", scores, weights.float())


class _Changed(SparseLatent):
    """Chooses by what `change` makes of the inputs."""

    def change(self, queries: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return queries, weights

    def choose_tokens(self, queries, weights, cache, plan, layer):  # type: ignore[no-untyped-def]
        return super().choose_tokens(*self.change(queries, weights), cache, plan, layer)


@fault("sparse-first-head-alone", "sparse", killed_by="latent.choose.001")
class FirstHeadAlone(_Changed):
    """One index head decides."""

    def change(self, queries: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return queries[:, :1], weights[:, :1]


@fault("sparse-weights-forgotten", "sparse", killed_by="latent.choose.001")
class WeightsForgotten(_Changed):
    """All index heads count alike."""

    def change(self, queries: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return queries, torch.ones_like(weights)


@fault("sparse-weights-of-first-token", "sparse", killed_by="latent.choose.002")
class WeightsOfFirstToken(_Changed):
    """The first token's weights serve all."""

    def change(self, queries: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return queries, weights[:1].expand_as(weights)


@fault("sparse-negative-products", "sparse", killed_by="latent.choose.002")
class NegativeProducts(SparseLatent):
    """Products below zero count too."""

    def choose_tokens(self, queries, weights, cache, plan, layer):  # type: ignore[no-untyped-def]
        flat = torch.einsum("thd,th->td", queries.float(), weights.float()).unsqueeze(1)
        both = torch.cat((flat, -flat), dim=1)  # max(0, x) - max(0, -x) is x
        signs = flat.new_tensor([[1.0, -1.0]]).expand(len(flat), 2)
        return super().choose_tokens(both, signs, cache, plan, layer)


@fault("sparse-ties-upwards", "sparse", killed_by="latent.choose.002")
class TiesUpwards(SparseLatent):
    """Of equal scores the later token is chosen."""

    def choose_tokens(self, queries, weights, cache, plan, layer):  # type: ignore[no-untyped-def]
        chosen = super().choose_tokens(queries, weights, cache, plan, layer)
        view = plan.view
        starts = view.query_start.tolist()
        for row, length in enumerate(view.seq_lens.tolist()):
            keys = cache.index[view.block_table[row].long()].flatten(0, 1)[:length]
            for token in range(starts[row], starts[row + 1]):
                position = length - (starts[row + 1] - token)
                scores = _scores(queries[token : token + 1], weights[token : token + 1], keys[: position + 1])[0]
                order = scores.flip(0).sort(descending=True, stable=True).indices[: self.spec.top_k]
                chosen[token, : len(order)] = (position - order).sort().values.int()
        return chosen


@fault("sparse-own-token-left-out", "sparse", killed_by="latent.choose.009")
class OwnTokenLeftOut(SparseLatent):
    """A query chooses among the tokens before it alone."""

    def choose_tokens(self, queries, weights, cache, plan, layer):  # type: ignore[no-untyped-def]
        chosen = super().choose_tokens(queries, weights, cache, plan, layer)
        return torch.where(chosen == plan.positions.unsqueeze(-1), -1, chosen)


@fault("sparse-whole-prompt", "sparse", killed_by="latent.choose.002")
class WholePrompt(SparseLatent):
    """All queries of a chunk choose what its last one does."""

    def choose_tokens(self, queries, weights, cache, plan, layer):  # type: ignore[no-untyped-def]
        chosen = super().choose_tokens(queries, weights, cache, plan, layer)
        starts = plan.view.query_start.tolist()
        for begin, end in itertools.pairwise(starts):
            chosen[begin:end] = chosen[end - 1 : end]
        return chosen


@fault("sparse-order-of-scores", "sparse", killed_by="latent.choose.001")
class OrderOfScores(SparseLatent):
    """Positions come in another order than the sequence's."""

    def choose_tokens(self, queries, weights, cache, plan, layer):  # type: ignore[no-untyped-def]
        return super().choose_tokens(queries, weights, cache, plan, layer).flip(1)


@fault("sparse-padding-chooses", "sparse", killed_by="latent.choose.003")
class PaddingChooses(SparseLatent):
    """A padded token chooses the first token."""

    def choose_tokens(self, queries, weights, cache, plan, layer):  # type: ignore[no-untyped-def]
        chosen = super().choose_tokens(queries, weights, cache, plan, layer)
        chosen[int(plan.view.query_start[-1]) :, 0] = 0
        return chosen


@fault("sparse-key-not-rotated", "sparse", killed_by="latent.choose.004")
class KeyNotRotated(SparseLatent):
    """Index keys are written without their positions."""

    def choose(self, index, cache, plan, layer, *, rope: Rope | None = None):  # type: ignore[no-untyped-def]
        if rope is not None:
            turned = index.turned(layer.ops, plan.positions, rope)
            index = IndexInputs(queries=turned.queries, keys=index.keys, weights=index.weights)
        return super().choose(index, cache, plan, layer)


@fault("sparse-halves-for-neighbours", "sparse", killed_by="latent.choose.005")
class HalvesForNeighbours(SparseLatent):
    """Index keys are always rotated by halves."""

    def choose(self, index, cache, plan, layer, *, rope: Rope | None = None):  # type: ignore[no-untyped-def]
        halves = None if rope is None else dataclasses.replace(rope, interleaved=False)
        return super().choose(index, cache, plan, layer, rope=halves)


@fault("sparse-key-next-slot", "sparse", killed_by="latent.choose.001")
class KeyNextSlot(SparseLatent):
    """An index key is written one slot behind its token's."""

    def write_index(self, keys, cache, plan, layer: LatentLayer):  # type: ignore[no-untyped-def]
        slots = torch.where(plan.view.slot_mapping >= 0, plan.view.slot_mapping + 1, plan.view.slot_mapping)
        view = dataclasses.replace(plan.view, slot_mapping=slots)
        return super().write_index(keys, cache, dataclasses.replace(plan, view=view), layer)


@fault("sparse-attends-to-all", "sparse", killed_by="latent.chosen.001")
class AttendsToAll(SparseLatent):
    """What was chosen is not looked at."""

    def attend_chosen(self, q_nope, q_rope, cache, plan, layer, chosen, *, out=None):  # type: ignore[no-untyped-def]
        return self.attend(q_nope, q_rope, cache, plan, layer, out=out)


@fault("sparse-missing-is-first", "sparse", killed_by="latent.chosen.001")
class MissingIsFirst(SparseLatent):
    """Where fewer are chosen, the first token stands in for the rest."""

    def attend_chosen(self, q_nope, q_rope, cache, plan, layer, chosen, *, out=None):  # type: ignore[no-untyped-def]
        padded = torch.arange(len(chosen)).unsqueeze(-1) >= plan.view.query_start[-1]
        filled = torch.where(padded, chosen, chosen.clamp(min=0))
        return super().attend_chosen(q_nope, q_rope, cache, plan, layer, filled, out=out)


@fault("sparse-one-choice-for-all", "sparse", killed_by="latent.chosen.002")
class OneChoiceForAll(SparseLatent):
    """A row's queries attend to what its first one chose."""

    def attend_chosen(self, q_nope, q_rope, cache, plan, layer, chosen, *, out=None):  # type: ignore[no-untyped-def]
        chosen, starts = chosen.clone(), plan.view.query_start.tolist()
        for begin, end in itertools.pairwise(starts):
            chosen[begin:end] = chosen[begin : begin + 1]
        return super().attend_chosen(q_nope, q_rope, cache, plan, layer, chosen, out=out)


@fault("sparse-index-not-copied", "sparse", killed_by="latent.index_storage.001")
class IndexNotCopied(SparseLatent):
    """A copy of a block has the rows alone."""

    def copy_blocks(self, cache, src: Sequence[int], dst: Sequence[int]):  # type: ignore[no-untyped-def]
        kept = cache.index.clone()
        copied = super().copy_blocks(cache, src, dst)
        copied.index.copy_(kept)
        return copied


@fault("sparse-index-not-imported", "sparse", killed_by="latent.index_storage.001")
class IndexNotImported(SparseLatent):
    """Blocks come back with the index keys that lay there before."""

    def import_arrays(self, cache, ids: Sequence[int], arrays):  # type: ignore[no-untyped-def]
        return super().import_arrays(cache, ids, {**arrays, "index": cache.index[list(ids)]})
