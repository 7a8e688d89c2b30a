"""Faults of latent attention that only its absorbed form has, or a context that is attended to in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip.ops.reference import ReferenceLatent
from anychip.plugin_api import LatentLayer
from anychip_conformance.faulty.registry import fault, placebo

_CHUNK = 16


@placebo("latent-absorbed-in-chunks", "latent")
class AbsorbedInChunks(ReferenceLatent):
    """k_up is folded into the queries, and chunks of rows are merged by their log-sum-exp."""

    def _attend_row(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, layer: LatentLayer) -> Tensor:
        first = len(rows) - len(q_nope)
        queries = torch.cat((self.folded(q_nope, layer), q_rope.float()), dim=-1)  # [queries, heads, row_dim]
        outputs, sums = [], []
        for begin in self.chunks(len(rows)):
            chunk = rows[begin : begin + _CHUNK].float()
            keys = torch.arange(begin, begin + len(chunk), device=rows.device)
            places = torch.arange(first, len(rows), device=rows.device).unsqueeze(-1)
            hidden = self.hidden(places, keys, begin)
            chunk = chunk.masked_fill(hidden.all(dim=0).unsqueeze(-1), 0)
            scores = torch.einsum("qhc,kc->hqk", queries, chunk) * self.scale(layer)
            scores = scores.masked_fill(hidden, -torch.inf)
            sums.append(scores.logsumexp(dim=-1))  # [heads, queries]
            weights = (scores - sums[-1].clamp(min=-1e30).unsqueeze(-1)).exp()
            outputs.append(torch.einsum("hqk,kc->hqc", weights, self.values(chunk)))
        merged = self.merged(torch.stack(outputs), torch.stack(sums))
        return self.unfolded(merged, layer).to(q_nope.dtype)

    def folded(self, q_nope: Tensor, layer: LatentLayer) -> Tensor:
        return torch.einsum("qhd,hdc->qhc", q_nope.float(), layer.k_up.float())

    def unfolded(self, merged: Tensor, layer: LatentLayer) -> Tensor:
        return torch.einsum("hqc,hdc->qhd", merged, layer.v_up.float())

    def chunks(self, length: int) -> range:
        return range(0, length, _CHUNK)

    def hidden(self, places: Tensor, keys: Tensor, begin: int) -> Tensor:
        """[queries, keys] bool: what a query at its place does not see."""
        hidden = keys > places
        return hidden if self.spec.window is None else hidden | (keys <= places - self.spec.window)

    def scale(self, layer: LatentLayer) -> float:
        return layer.scale

    def values(self, chunk: Tensor) -> Tensor:
        return chunk[:, : self.spec.latent_dim]

    def merged(self, outputs: Tensor, sums: Tensor) -> Tensor:
        """outputs [chunks, heads, queries, latent_dim] by their log-sum-exps [chunks, heads, queries]."""
        return (outputs * sums.softmax(dim=0).unsqueeze(-1)).sum(dim=0)


@fault("latent-absorbed-scale-forgotten", "latent", killed_by="latent.attend.001")
class AbsorbedScaleForgotten(AbsorbedInChunks):
    """Folded queries meet the rows without a scale."""

    def scale(self, layer: LatentLayer) -> float:
        return 1.0


@fault("latent-absorbed-scale-of-the-row", "latent", killed_by="latent.attend.001")
class AbsorbedScaleOfTheRow(AbsorbedInChunks):
    """Scores are divided by the root of the row's width, which the folded queries have, and not of a head's."""

    def scale(self, layer: LatentLayer) -> float:
        return float(self.spec.row_dim**-0.5)


@fault("latent-absorbed-by-the-next-head", "latent", killed_by="latent.attend.001")
class AbsorbedByTheNextHead(AbsorbedInChunks):
    """A head's queries are folded with its neighbour's factor."""

    def folded(self, q_nope: Tensor, layer: LatentLayer) -> Tensor:
        return torch.einsum("qhd,hdc->qhc", q_nope.float(), layer.k_up.float().roll(1, dims=0))


@fault("latent-unfolded-by-the-next-head", "latent", killed_by="latent.attend.001")
class UnfoldedByTheNextHead(AbsorbedInChunks):
    """A head's sums are unfolded with its neighbour's factor."""

    def unfolded(self, merged: Tensor, layer: LatentLayer) -> Tensor:
        return torch.einsum("hqc,hdc->qhd", merged, layer.v_up.float().roll(1, dims=0))


@fault("latent-values-from-the-rows-end", "latent", killed_by="latent.attend.001")
class ValuesFromTheRowsEnd(AbsorbedInChunks):
    """The rotated values count as values, and the first latent ones do not."""

    def values(self, chunk: Tensor) -> Tensor:
        return chunk[:, -self.spec.latent_dim :]


@fault("latent-chunks-averaged", "latent", killed_by="latent.attend.002")
class ChunksAveraged(AbsorbedInChunks):
    """Chunks count alike, whatever their scores."""

    def merged(self, outputs: Tensor, sums: Tensor) -> Tensor:
        seen = (sums > -torch.inf).float().unsqueeze(-1)
        return (outputs * seen).sum(dim=0) / seen.sum(dim=0)


@fault("latent-greatest-chunk-wins", "latent", killed_by="latent.attend.003")
class GreatestChunkWins(AbsorbedInChunks):
    """The chunk of the greatest sum is taken for all."""

    def merged(self, outputs: Tensor, sums: Tensor) -> Tensor:
        best = sums.argmax(dim=0, keepdim=True).unsqueeze(-1).expand(1, *outputs.shape[1:])
        return outputs.gather(0, best).squeeze(0)


@fault("latent-short-chunk-lost", "latent", killed_by="latent.attend.003")
class ShortChunkLost(AbsorbedInChunks):
    """A last chunk that is not full is left out, where there are others."""

    def chunks(self, length: int) -> range:
        return range(0, max(length - length % _CHUNK, min(length, _CHUNK)), _CHUNK)


@fault("latent-chunk-counts-from-zero", "latent", killed_by="latent.attend.002")
class ChunkCountsFromZero(AbsorbedInChunks):
    """Keys of every chunk are taken for the sequence's first ones: queries see later tokens."""

    def hidden(self, places: Tensor, keys: Tensor, begin: int) -> Tensor:
        return super().hidden(places, keys - begin, begin)


@fault("latent-window-by-chunk", "latent", killed_by="latent.attend.007")
class WindowByChunk(AbsorbedInChunks):
    """A window ends at a chunk's beginning."""

    def hidden(self, places: Tensor, keys: Tensor, begin: int) -> Tensor:
        if self.spec.window is None:
            return super().hidden(places, keys, begin)
        return (keys > places) | (begin + _CHUNK <= places - self.spec.window)
