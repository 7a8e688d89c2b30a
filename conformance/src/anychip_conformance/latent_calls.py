"""One call of latent attention: the case, a poisoned pool with each row's context, inputs; and its judgement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from torch import Tensor

from anychip.plugin_api import LatentBackend, LatentLayer, LatentSpec, Rope
from anychip.types import cdiv
from anychip_conformance import needles
from anychip_conformance.batch import Padding, PagedBatch, Row, paged_batch
from anychip_conformance.choices import CaseDtype
from anychip_conformance.device import Device, seen, unchanged
from anychip_conformance.oracle.rounding import UNIT_ROUNDOFF, gamma, rounded
from anychip_conformance.oracle.vectorised import Bounded, rotary

_SPARE_BLOCKS = 3
_MAX_POSITIONS = 4096


class LatentCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`page` picks among the backend's block sizes."""

    rows: tuple[Row, ...]
    dtype: CaseDtype = "any"
    num_heads: int = 4
    latent_dim: int = 32
    rope_dim: int = 16
    nope_dim: int = 16
    v_dim: int = 24
    window: int | None = None
    rope: bool = False
    needles: bool = False
    """A few rows of each context have all the weight, so that missing one shows."""
    page: int = 0
    pad_tokens: int = 0
    pad_rows: int = 0
    seed: int = 0

    @property
    def spec(self) -> LatentSpec:
        return LatentSpec(
            num_heads=self.num_heads,
            latent_dim=self.latent_dim,
            rope_dim=self.rope_dim,
            nope_dim=self.nope_dim,
            v_dim=self.v_dim,
            dtype=self.dtype,
            kv_dtype=self.dtype,
            window=self.window,
        )

    def context_rows(self, rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """What the cache's array of this name holds of a row's context."""
        rows = rng.normal(size=shape)
        if name == "latent" and self.needles:
            rows[:, self.latent_dim :] *= 0.03
            rows[needles.places(len(rows), self.window, 1), self.latent_dim :] = self.needle
        return rows

    @property
    def needle(self) -> np.ndarray:
        """The rotated part of a key that counts, and of the queries that find it."""
        return needles.direction(self.rope_dim, self.scale)

    @property
    def scale(self) -> float:
        return float((self.nope_dim + self.rope_dim) ** -0.5)


def backend_for(device: Device, case: LatentCase) -> LatentBackend:
    """The backend, once every capability that the case needs is declared."""
    caps, platform = device.capabilities, device.platform
    device.need_dtype(case.dtype)

    def refused() -> object:
        return platform.latent(case.spec)

    device.need("mla", caps.mla, refused)
    device.need(f"kv dtype {case.dtype}", case.dtype in caps.kv_dtypes, refused)
    if case.window is not None:
        device.need("sliding_window", caps.sliding_window, refused)
    if case.spec.index_dim:
        device.need("sparse_latent", caps.sparse_latent, refused)
    return platform.latent(case.spec)


@dataclass(slots=True)
class LatentCall:
    """A call that is made, and not yet run."""

    device: Device
    case: LatentCase
    backend: LatentBackend
    batch: PagedBatch
    cache: Any
    num_blocks: int
    block_size: int
    layer: LatentLayer
    inputs: dict[str, Tensor]
    rope: Rope | None

    @classmethod
    def make(cls, device: Device, case: LatentCase) -> LatentCall:
        backend, rng = backend_for(device, case), np.random.default_rng(case.seed)
        sizes = backend.kv_layout().block_sizes
        size = sizes[case.page % len(sizes)]
        pages = [cdiv(row.context(size) + row.query, size) for row in case.rows]
        num_blocks = 1 + sum(pages) + _SPARE_BLOCKS
        ids = (rng.permutation(num_blocks - 1) + 1).tolist()
        tables = [[ids.pop() for _ in range(count)] for count in pages]
        padding = Padding(tokens=case.pad_tokens, rows=case.pad_rows)
        batch = paged_batch(
            device, list(case.rows), block_size=size, tables=tables, padding=padding, window=case.window
        )
        raw = device.platform.empty((num_blocks * backend.kv_layout().page_bytes(size),), "uint8", "kv")
        cache = backend.make_cache(raw, num_blocks, size)
        arrays = {}
        for array in case.spec.canonical(size):
            held = np.full((num_blocks, *array.shape), device.poison)
            for table, context in zip(tables, batch.contexts, strict=True):
                rows = case.context_rows(rng, array.name, (context, *array.shape[1:]))
                for page in range(cdiv(context, size)):
                    part = rows[page * size : (page + 1) * size]
                    held[table[page], : len(part)] = part
            arrays[array.name] = device.held(held, case.dtype)
        cache = backend.import_arrays(cache, range(num_blocks), arrays)
        shapes = {
            "q_nope": (case.num_heads, case.nope_dim),
            "q_rope": (case.num_heads, case.rope_dim),
            "latent": (case.latent_dim,),
            "k_rope": (case.rope_dim,),
        }
        inputs = {
            name: device.tensor(rng.normal(size=(batch.key.num_tokens, *shape)), case.dtype)
            for name, shape in shapes.items()
        }
        if case.needles:
            inputs["q_nope"].mul_(0.03)
            inputs["q_rope"].copy_(device.held(case.needle, case.dtype))
        up = {"k_up": case.nope_dim, "v_up": case.v_dim}
        weights = {
            name: device.held(rng.normal(size=(case.num_heads, dim, case.latent_dim)) / 4, case.dtype)
            for name, dim in up.items()
        }
        layer = LatentLayer(index=0, scale=case.scale, ops=device.ops.ops, **weights)
        rope = None
        if case.rope:
            angles = np.outer(
                np.arange(
                    max(_MAX_POSITIONS, *(c + row.query for c, row in zip(batch.contexts, case.rows, strict=True)))
                ),
                100.0 ** (-np.arange(case.rope_dim // 2) / case.rope_dim),
            )
            cos, sin = device.held(np.cos(angles), "float32"), device.held(np.sin(angles), "float32")
            rope = Rope(cos=cos, sin=sin, rotary_dim=case.rope_dim)
        return cls(device, case, backend, batch, cache, num_blocks, size, layer, inputs, rope)

    def held(self, name: str = "latent") -> Tensor:
        """Every block in canonical form, [num_blocks, block_size, row_dim]; or another array of it."""
        return self.backend.export_arrays(self.cache, range(self.num_blocks))[name].clone()

    def run(self) -> Tensor:
        """The output; the cache is replaced by the one that came back."""
        plan = self.backend.plan(self.batch.view, self.batch.key, group=0)
        names = ("q_nope", "q_rope", "latent", "k_rope")
        given = [self.inputs[name] for name in names]
        result, self.cache = self.backend.forward(*given, self.cache, plan, self.layer, rope=self.rope)
        return result

    def check(self) -> None:
        """Runs it and judges the rows that it wrote, every other one, the output, its padding, and the inputs."""
        device, case, batch, size = self.device, self.case, self.batch, self.block_size
        before = self.held()
        same = unchanged(device, self.inputs)
        result = self.run()
        same()
        after = self.held()
        blocks, offsets = batch.slots // size, batch.slots % size
        new = after[blocks, offsets]
        latent = self.inputs["latent"][: batch.num_tokens]
        device.same_bits("latent values in the cache", new[:, : case.latent_dim].contiguous(), latent.contiguous())
        device.compare("rotated values in the cache", new[:, case.latent_dim :], self.rotated("k_rope"))
        others = after.clone()
        others[blocks, offsets] = before[blocks, offsets]
        device.same_bits("rows that nobody wrote", others[1:], before[1:])  # block 0 takes what padded rows write
        shape = (batch.key.num_tokens, case.num_heads, case.v_dim)
        assert tuple(result.shape) == shape, f"the output has shape {tuple(result.shape)}, expected {shape}"
        held = seen(after)
        q_rope = self.rotated("q_rope")
        for row, (start, context, query) in enumerate(zip(batch.starts, batch.contexts, batch.queries, strict=True)):
            if query:
                pages = cdiv(context + query, size)
                rows = held[batch.tables[row][:pages]].reshape(-1, case.spec.row_dim)[: context + query]
                expected = self.expected(rows, slice(start, start + query), q_rope)
                device.compare(
                    f"output of row {row}", result[start : start + query], expected, label=f"latent/{case.dtype}"
                )
        padded = result[batch.num_tokens :]
        if len(padded) and device.capabilities.padding == "zero_rows":
            zero = np.zeros(tuple(padded.shape))
            device.compare("padded rows", padded, Bounded(zero, zero))

    def rotated(self, name: str) -> Bounded:
        """An input after rotary, and how far a backend's may be from it."""
        given = seen(self.inputs[name])[: self.batch.num_tokens]
        if self.rope is None:
            return Bounded(given, np.zeros_like(given))
        positions = seen(self.batch.view.positions)[: self.batch.num_tokens].astype(int)
        heads = given if given.ndim == 3 else given[:, None]
        found = rotary(heads, seen(self.rope.cos), seen(self.rope.sin), positions, False, self.case.dtype)
        return Bounded(found.value.reshape(given.shape), found.bound.reshape(given.shape))

    def expected(self, rows: np.ndarray, mine: slice, q_rope: Bounded, unseen: np.ndarray | None = None) -> Bounded:
        """Attention of a sequence's last tokens over its rows, expanded in float64; `unseen` [queries, keys] are not
        attended to. A backend may expand the rows, or fold the one factor into the query and the other into the output:
        what it makes on the way may be rounded to the dtype, twice."""
        case, u = self.case, UNIT_ROUNDOFF[self.case.dtype]
        k_up, v_up, q_nope = seen(self.layer.k_up), seen(self.layer.v_up), seen(self.inputs["q_nope"])[mine]
        queries = np.arange(len(rows) - len(q_nope), len(rows))[:, None]
        keys = np.arange(len(rows))
        hidden = keys > queries
        if case.window is not None:
            hidden = hidden | (keys <= queries - case.window)
        if unseen is not None:
            hidden = hidden | unseen
        rows = np.where(hidden.all(axis=0)[:, None], 0.0, rows)  # blocks that a window has passed may hold anything
        latent, k_rope = rows[:, : case.latent_dim], rows[:, case.latent_dim :]
        turned, off = q_rope.value[mine], q_rope.bound[mine]

        def products(q: np.ndarray, up: np.ndarray, held: np.ndarray, by: np.ndarray, rope: np.ndarray) -> np.ndarray:
            folded = np.einsum("qhd,hdc,kc->hqk", q, up, held, optimize=True)
            return np.asarray(folded + np.einsum("qhd,kd->hqk", by, rope))

        scores = case.scale * products(q_nope, k_up, latent, turned, k_rope)
        sizes = case.scale * products(abs(q_nope), abs(k_up), abs(latent), abs(turned), abs(k_rope))
        steps = gamma(case.latent_dim + case.nope_dim + case.rope_dim + 8) + gamma(2, u)
        error = sizes * steps + case.scale * np.einsum("qhd,kd->hqk", off, abs(k_rope))
        scores, error = np.where(hidden, -np.inf, scores), np.where(hidden, 0.0, error)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        values, magnitudes = (np.einsum("kc,hdc->khd", *pair) for pair in ((latent, v_up), (abs(latent), abs(v_up))))
        value = np.einsum("hqk,khd->qhd", weights, values)
        spread = np.einsum("hqk,khd->qhd", weights * np.expm1(2 * error.max(axis=-1, keepdims=True)), magnitudes)
        total = np.einsum("hqk,khd->qhd", weights, magnitudes)
        bound = spread + total * (gamma(case.latent_dim + len(rows) + 8) + gamma(2, u))
        return Bounded(value, bound + rounded(value, case.dtype))
