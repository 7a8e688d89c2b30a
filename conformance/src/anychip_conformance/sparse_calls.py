"""One call of sparse latent attention: index keys in the pool, a choice by them, and attention to a choice."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from anychip.plugin_api import IndexInputs, LatentSpec, Rope
from anychip.types import cdiv
from anychip_conformance.device import Device, seen, unchanged
from anychip_conformance.latent_calls import LatentCall, LatentCase
from anychip_conformance.oracle.rounding import UNIT_ROUNDOFF, gamma
from anychip_conformance.oracle.vectorised import Bounded, rotary


class SparseCase(LatentCase, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`whole` numbers in queries, keys and weights make scores exact, and many of them equal."""

    index_dim: int = 16
    index_heads: int = 3
    top_k: int = 12
    whole: bool = False
    interleaved: bool = False

    @property
    def spec(self) -> LatentSpec:
        return replace(super().spec, index_dim=self.index_dim, top_k=self.top_k)

    def values(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Of index queries, keys and weights."""
        return rng.integers(-1, 2, size=shape).astype(float) if self.whole else rng.normal(size=shape)

    def context_rows(self, rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return self.values(rng, shape) if name == "index" else super().context_rows(rng, name, shape)


@dataclass(slots=True)
class SparseCall:
    """`dense` holds pool, batch and inputs of attention; `index` what tokens choose by."""

    device: Device
    case: SparseCase
    dense: LatentCall
    index: IndexInputs

    @classmethod
    def make(cls, device: Device, case: SparseCase) -> SparseCall:
        dense, rng = LatentCall.make(device, case), np.random.default_rng((case.seed, 1))
        tokens = dense.batch.key.num_tokens
        index = IndexInputs(
            queries=device.tensor(case.values(rng, (tokens, case.index_heads, case.index_dim)), case.dtype),
            keys=device.tensor(case.values(rng, (tokens, case.index_dim)), case.dtype),
            weights=device.tensor(case.values(rng, (tokens, case.index_heads)), "float32"),
        )
        return cls(device, case, dense, index)

    @property
    def rope(self) -> Rope | None:
        return None if self.dense.rope is None else replace(self.dense.rope, interleaved=self.case.interleaved)

    def choose(self) -> Tensor:
        """Runs `choose`; the cache is replaced by the one that came back."""
        call = self.dense
        plan = call.backend.plan(call.batch.view, call.batch.key, group=0)
        chosen, call.cache = call.backend.choose(self.index, call.cache, plan, call.layer, rope=self.rope)
        return chosen

    def attend(self, chosen: Tensor) -> Tensor:
        call = self.dense
        plan = call.backend.plan(call.batch.view, call.batch.key, group=0)
        names = ("q_nope", "q_rope", "latent", "k_rope")
        given = [call.inputs[name] for name in names]
        result, call.cache = call.backend.forward(*given, call.cache, plan, call.layer, rope=call.rope, chosen=chosen)
        return result

    # -- judging ------------------------------------------------------------------------------------------

    def check_choice(self) -> None:
        """Runs it and judges the keys that it wrote, all that it did not, and each query's choice."""
        device, call, batch = self.device, self.dense, self.dense.batch
        before, rows_before = call.held("index"), call.held()
        same = unchanged(
            device, {"queries": self.index.queries, "keys": self.index.keys, "weights": self.index.weights}
        )
        chosen = self.choose()
        same()
        after = call.held("index")
        blocks, offsets = batch.slots // call.block_size, batch.slots % call.block_size
        device.compare("index keys in the cache", after[blocks, offsets], self._turned(self.index.keys))
        others = after.clone()
        others[blocks, offsets] = before[blocks, offsets]
        device.same_bits("index keys that nobody wrote", others[1:], before[1:])
        device.same_bits("rows beside them", call.held()[1:], rows_before[1:])
        shape = (batch.key.num_tokens, self.case.top_k)
        assert tuple(chosen.shape) == shape, f"the choice has shape {tuple(chosen.shape)}, expected {shape}"
        keys, got = seen(after), seen(chosen).astype(int)
        queries = self._turned(self.index.queries)
        for start, position, held in self._sequences(keys):
            mine = Bounded(queries.value[start], queries.bound[start])
            self._judge(got[start], start, mine, held[: position + 1])
        assert (got[batch.num_tokens :] == -1).all(), "a padded token chose something"

    def _sequences(self, held: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
        """For each token that is no padding: its place in the step, its position, and what its sequence holds."""
        batch, size = self.dense.batch, self.dense.block_size
        found = []
        for row, (start, context, query) in enumerate(zip(batch.starts, batch.contexts, batch.queries, strict=True)):
            pages = cdiv(context + query, size)
            mine = held[batch.tables[row][:pages]].reshape(-1, held.shape[-1])
            found += [(start + number, context + number, mine) for number in range(query)]
        return found

    def _judge(self, chosen: np.ndarray, token: int, query: Bounded, keys: np.ndarray) -> None:
        """A choice is the best by exact scores, ties by place; where scores are rounded, none is far worse than one
        that was left out."""
        count = min(self.case.top_k, len(keys))
        places, rest = chosen[:count], chosen[count:]
        assert (rest == -1).all(), f"token {token}: {rest} behind {count} choices; expected -1"
        assert (np.diff(places) > 0).all() and places[0] >= 0 and places[-1] < len(keys), (
            f"token {token} chose {places} of {len(keys)} tokens; expected ascending positions"
        )
        weights = seen(self.index.weights)[token]
        products = query.value @ keys.T  # [heads, keys]
        scores = weights @ np.maximum(products, 0.0)
        steps = gamma(self.case.index_dim + self.case.index_heads + 4)
        if self.case.dtype != "float32":
            steps += gamma(2, UNIT_ROUNDOFF[self.case.dtype])  # products may be rounded to the dtype
        sizes = abs(query.value) @ abs(keys).T * steps + query.bound @ abs(keys).T
        bound = 0.0 if self.case.whole else abs(weights) @ sizes
        best = np.lexsort((np.arange(len(keys)), -scores))[:count]
        if self.case.whole:
            assert (np.sort(best) == places).all(), f"token {token} chose {places}, expected {np.sort(best)}"
            return
        left = np.setdiff1d(np.arange(len(keys)), places)
        if len(left):
            worst, most = (scores + bound)[places].min(), (scores - bound)[left].max()
            assert worst >= most, f"token {token} left out a score of {most:.6g} for one of {worst:.6g}"

    def _turned(self, given: Tensor) -> Bounded:
        """Index queries or keys after rotary of their first values."""
        values = seen(given)[: self.dense.batch.num_tokens]
        rope = self.rope
        if rope is None:
            return Bounded(values, np.zeros_like(values))
        positions = seen(self.dense.batch.view.positions)[: len(values)].astype(int)
        heads = values if values.ndim == 3 else values[:, None]
        found = rotary(heads, seen(rope.cos), seen(rope.sin), positions, rope.interleaved, self.case.dtype)
        return Bounded(found.value.reshape(values.shape), found.bound.reshape(values.shape))

    def check_attention(self, chosen: Tensor) -> None:
        """Attends to `chosen`, and judges the output against attention to these rows alone."""
        device, call, batch = self.device, self.dense, self.dense.batch
        result = self.attend(chosen)
        held, picked = seen(call.held()), seen(chosen).astype(int)
        q_rope = call.rotated("q_rope")
        for row, (start, context, query) in enumerate(zip(batch.starts, batch.contexts, batch.queries, strict=True)):
            if not query:
                continue
            length = context + query
            pages = batch.tables[row][: cdiv(length, call.block_size)]
            rows = held[pages].reshape(-1, held.shape[-1])[:length]
            unseen = np.ones((query, length), dtype=bool)
            for number in range(query):
                unseen[number, [place for place in picked[start + number] if place >= 0]] = False
            expected = call.expected(rows, slice(start, start + query), q_rope, unseen)
            device.compare(f"output of row {row}", result[start : start + query], expected, label="sparse/latent")
        padded = result[batch.num_tokens :]
        if len(padded) and device.capabilities.padding == "zero_rows":
            zero = np.zeros(tuple(padded.shape))
            device.compare("padded rows", padded, Bounded(zero, zero))

    def random_choice(self) -> Tensor:
        """Up to top_k positions of each token's sequence, its own among them, and never all."""
        rng, case = np.random.default_rng((self.case.seed, 2)), self.case
        chosen = np.full((self.dense.batch.key.num_tokens, case.top_k), -1)
        for token, position, _ in self._sequences(seen(self.dense.held("index"))):
            count = min(case.top_k - 1, position // 2)
            some = np.sort(np.append(rng.permutation(position)[:count], position))
            chosen[token, : len(some)] = some
        return self.device.tensor(chosen, "int32")
