"""Latent attention in both of its forms, in torch's products.

Absorbed: k_up is folded into the queries and v_up into the outputs, and all heads of a row attend over the rows
themselves. Expanded: a chunk of rows becomes keys and values by head, and what its chunks attend to is merged by the
log-sum-exp. A row of few queries is cheaper absorbed, for nothing is made of its context; one of many is cheaper
expanded, whose products are narrower. Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anychip.ops.reference import ReferenceLatent
from anychip.plugin_api import BatchView, LatentLayer, LatentSpec, Recorder, ShapeKey

_CHUNK = 1024
"""Rows that are expanded at once: keys and values of as many tokens, by head, lie in memory together."""
_BATCHED_KEYS = 1 << 17
"""Most places of context that single queries attend over together: their rows are gathered first."""


@dataclass(slots=True)
class SingleRows:
    """Rows with one query each, whose context is gathered together."""

    tokens: Tensor  # [rows] index of each row's query
    table: Tensor  # [rows, pages]
    hidden: Tensor  # [rows, pages * block_size] bool: past the row's tokens, or before its window


@dataclass(slots=True)
class QueryRow:
    """A row with several queries."""

    begin: int
    end: int
    blocks: Tensor  # [pages]
    start: int
    """Position of the first query."""
    first: int
    """Position of the first key that is looked at, at a block's beginning."""
    absorbed: bool


@dataclass(slots=True)
class LatentPlan:
    positions: Tensor
    written: Tensor  # [tokens] the tokens that have a slot
    slots: Tensor  # [tokens]
    singles: list[SingleRows]
    rows: list[QueryRow]


class CpuLatent(ReferenceLatent):
    """[num_blocks, block_size, latent_dim + rope_dim], in the queries' dtype or in fp8; softmax and sums in float32."""

    name = "cpu-latent"

    def __init__(self, spec: LatentSpec) -> None:
        super().__init__(spec)
        self._most_absorbed = most_absorbed(spec)

    # -- planning -----------------------------------------------------------------------------------------

    def plan(
        self,
        batch: BatchView,
        shape: ShapeKey,
        *,
        group: int,
        into: object | None = None,
        recorder: Recorder | None = None,
    ) -> LatentPlan:
        # The device is the host: reading lengths here waits for nothing.
        starts, lengths = batch.query_start.numpy(), batch.seq_lens.numpy()
        queries = np.diff(starts)
        written = (batch.slot_mapping >= 0).nonzero().squeeze(-1)
        return LatentPlan(
            positions=batch.positions,
            written=written,
            slots=batch.slot_mapping[written],
            singles=self._singles(batch, starts, lengths, np.flatnonzero(queries == 1)),
            rows=[
                self._row(batch, int(starts[row]), int(starts[row + 1]), int(lengths[row]), row)
                for row in np.flatnonzero(queries > 1).tolist()
            ],
        )

    def _singles(self, batch: BatchView, starts: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> list[SingleRows]:
        """In groups of like lengths, none of which gathers too much."""
        size, window = batch.block_size, self.spec.window
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        groups = list[SingleRows]()
        while len(rows):
            # Of the sorted rows, those whose places, as many for each as for the longest, stay below the limit.
            places = lengths[rows] * np.arange(1, len(rows) + 1)
            count = max(1, int(np.searchsorted(places, _BATCHED_KEYS)))
            mine, rows = rows[:count], rows[count:]
            held = lengths[mine]
            first = 0 if window is None else max(0, int(held.min()) - window) // size
            last = -(-int(held.max()) // size)
            keys = np.arange(first * size, last * size)
            hidden = keys >= held[:, None]
            if window is not None:
                hidden |= keys < held[:, None] - window
            groups.append(
                SingleRows(
                    tokens=torch.from_numpy(starts[mine].astype(np.int64)),
                    table=batch.block_table[torch.from_numpy(mine), first:last].long(),
                    hidden=torch.from_numpy(hidden),
                )
            )
        return groups

    def _row(self, batch: BatchView, begin: int, end: int, length: int, row: int) -> QueryRow:
        size, window = batch.block_size, self.spec.window
        start = length - (end - begin)
        first_page = 0 if window is None else max(0, start + 1 - window) // size
        blocks = batch.block_table[row, first_page : -(-length // size)].long()
        absorbed = self._most_absorbed is None or end - begin <= self._most_absorbed
        return QueryRow(begin, end, blocks, start, first_page * size, absorbed)

    # -- running ------------------------------------------------------------------------------------------

    def write_rows(self, latent: Tensor, k_rope: Tensor, cache: Tensor, plan: LatentPlan, layer: LatentLayer) -> Tensor:
        rows = self.encoded(torch.cat((latent, k_rope), dim=-1))
        cache.flatten(0, 1)[plan.slots] = rows if len(plan.written) == len(rows) else rows[plan.written]
        return cache

    def attend(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        plan: LatentPlan,
        layer: LatentLayer,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        shape = (len(q_nope), self.spec.num_heads, self.spec.v_dim)
        result = q_nope.new_zeros(shape) if out is None else out.zero_()
        for rows in plan.singles:
            pages = self.decoded(cache[rows.table].flatten(1, 2)).float()  # [rows, keys, row_dim]
            # A weight of zero multiplies a value, so what free blocks hold, which may be anything, becomes zeros.
            pages.masked_fill_(rows.hidden.unsqueeze(-1), 0)
            folded = self._folded(q_nope[rows.tokens], q_rope[rows.tokens], layer).float()
            scores = torch.bmm(folded, pages.transpose(1, 2)) * layer.scale  # [rows, heads, keys]
            weights = scores.masked_fill_(rows.hidden.unsqueeze(1), -torch.inf).softmax(dim=-1)
            latents = torch.bmm(weights, pages[..., : self.spec.latent_dim]).to(q_nope.dtype)
            result[rows.tokens] = self._unfolded(latents, layer)
        for row in plan.rows:
            mine = slice(row.begin, row.end)
            held = self.decoded(cache[row.blocks].flatten(0, 1)[: row.start + row.end - row.begin - row.first])
            attended = self._absorbed if row.absorbed else self._expanded
            result[mine] = attended(q_nope[mine], q_rope[mine], held, row, layer)
        return result

    def _folded(self, q_nope: Tensor, q_rope: Tensor, layer: LatentLayer) -> Tensor:
        """Queries [n, heads, row_dim] that meet rows as they are."""
        folded = torch.bmm(q_nope.transpose(0, 1), layer.k_up).transpose(0, 1)  # [n, heads, latent_dim]
        return torch.cat((folded, q_rope), dim=-1)

    def _unfolded(self, latents: Tensor, layer: LatentLayer) -> Tensor:
        """Sums of rows [n, heads, latent_dim] to outputs [n, heads, v_dim]."""
        return torch.bmm(latents.transpose(0, 1), layer.v_up.transpose(1, 2)).transpose(0, 1)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, held: Tensor, row: QueryRow, layer: LatentLayer) -> Tensor:
        queries = self._folded(q_nope, q_rope, layer).transpose(0, 1).float()  # [heads, queries, row_dim]
        merged = Merged(queries.shape[:2], self.spec.latent_dim)
        for first in range(0, len(held), _CHUNK):
            chunk = held[first : first + _CHUNK]
            hidden = self._hidden(row, first, len(chunk))
            chunk = chunk.float().masked_fill(hidden.all(dim=0).unsqueeze(-1), 0)
            scores = queries @ chunk.T * layer.scale
            merged.add(scores.masked_fill(hidden, -torch.inf), chunk[:, : self.spec.latent_dim])
        return self._unfolded(merged.result().to(held.dtype).transpose(0, 1), layer)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, held: Tensor, row: QueryRow, layer: LatentLayer) -> Tensor:
        queries = torch.cat((q_nope, q_rope), dim=-1).transpose(0, 1).float()  # [heads, queries, nope_dim + rope_dim]
        merged = Merged(queries.shape[:2], self.spec.v_dim)
        for first in range(0, len(held), _CHUNK):
            chunk = held[first : first + _CHUNK]
            hidden = self._hidden(row, first, len(chunk))
            # What a window has passed lies in blocks that may hold anything.
            chunk = chunk.masked_fill(hidden.all(dim=0).unsqueeze(-1), 0)
            latent, k_rope = chunk.tensor_split([self.spec.latent_dim], dim=-1)
            k_nope = latent @ layer.k_up.transpose(1, 2)  # [heads, keys, nope_dim]
            keys = torch.cat((k_nope, k_rope.expand(len(k_nope), -1, -1)), dim=-1).float()
            scores = torch.bmm(queries, keys.transpose(1, 2)) * layer.scale
            values = (latent @ layer.v_up.transpose(1, 2)).float()  # [heads, keys, v_dim]
            merged.add(scores.masked_fill(hidden, -torch.inf), values)
        return merged.result().to(held.dtype).transpose(0, 1)

    def _hidden(self, row: QueryRow, first: int, count: int) -> Tensor:
        """[queries, count] bool: keys, from the `first` held one on, that a query does not see."""
        keys = torch.arange(row.first + first, row.first + first + count)
        queries = torch.arange(row.start, row.start + row.end - row.begin).unsqueeze(-1)
        hidden = keys > queries
        return hidden if self.spec.window is None else hidden | (keys <= queries - self.spec.window)


class Merged:
    """Attention over chunks of keys: each chunk's sums, brought to the greatest score so far."""

    def __init__(self, shape: tuple[int, ...], dim: int) -> None:
        self.most = torch.full(shape, -torch.inf)  # [heads, queries]
        self.total = torch.zeros(shape)
        self.sums = torch.zeros(*shape, dim)

    def add(self, scores: Tensor, values: Tensor) -> None:
        """scores [heads, queries, keys], values [keys, dim] or [heads, keys, dim], float32."""
        most = torch.maximum(self.most, scores.amax(dim=-1))
        known = most.masked_fill(most == -torch.inf, 0)  # of a query that has seen no key yet
        weights = (scores - known.unsqueeze(-1)).exp_()
        kept = (self.most - known).exp_()
        self.total = self.total * kept + weights.sum(dim=-1)
        self.sums = self.sums * kept.unsqueeze(-1) + weights @ values
        self.most = most

    def result(self) -> Tensor:
        """[heads, queries, dim] float32."""
        return self.sums / self.total.unsqueeze(-1)


def most_absorbed(spec: LatentSpec) -> int | None:
    """Up to how many queries of a row the absorbed form multiplies less; None: always. Expanding costs each key of each
    head latent_dim * (nope_dim + v_dim) products once. Absorbed, each query and key costs wider ones."""
    absorbed = spec.row_dim + spec.latent_dim
    expanded = spec.nope_dim + spec.rope_dim + spec.v_dim
    if absorbed <= expanded:
        return None
    return spec.latent_dim * (spec.nope_dim + spec.v_dim) // (absorbed - expanded)
