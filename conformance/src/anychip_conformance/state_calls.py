"""One call of a state layer: the case, a poisoned pool with each row's state, inputs; and its judgement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from anychip.plugin_api import (
    NULL_BLOCK,
    CanonicalArray,
    ShapeKey,
    StateBackend,
    StateLayer,
    StateSpec,
    StateView,
)
from anychip_conformance.choices import CaseDtype
from anychip_conformance.device import Device, seen, unchanged
from anychip_conformance.oracle.rounding import gamma, rounded
from anychip_conformance.oracle.vectorised import Bounded

_RECURRENCE = "gated_sum"
_SPARE_BLOCKS = 3


class StateRow(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that has taken in `context` tokens, and takes in `query` more."""

    context: int
    query: int


class StateCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`width`: numbers of the state."""

    rows: tuple[StateRow, ...]
    dtype: CaseDtype = "any"
    width: int = 24
    pad_tokens: int = 0
    pad_rows: int = 0
    seed: int = 0

    @property
    def spec(self) -> StateSpec:
        array = CanonicalArray("sum", (self.width,), "float32")
        return StateSpec(recurrence=_RECURRENCE, arrays=(array,), dtype=self.dtype)


def backend_for(device: Device, case: StateCase) -> StateBackend:
    """The backend, once every capability that the case needs is declared."""
    device.need_dtype(case.dtype)
    declared = _RECURRENCE in device.capabilities.recurrences
    device.need(f"recurrence {_RECURRENCE}", declared, lambda: device.platform.state(case.spec))
    return device.platform.state(case.spec)


@dataclass(slots=True)
class StateCall:
    """A call that is made, and not yet run. `states` [rows, width] are those before it, float64; `blocks` by row."""

    device: Device
    case: StateCase
    backend: StateBackend
    cache: Any
    num_blocks: int
    blocks: list[int]
    states: np.ndarray
    view: StateView
    key: ShapeKey
    x: Tensor
    gate: Tensor

    @classmethod
    def make(cls, device: Device, case: StateCase) -> StateCall:
        backend, rng = backend_for(device, case), np.random.default_rng(case.seed)
        num_blocks = 1 + len(case.rows) + _SPARE_BLOCKS
        raw = device.platform.empty((num_blocks * backend.state_bytes(),), "uint8", "kv")
        cache = backend.make_cache(raw, num_blocks)
        blocks = (rng.permutation(num_blocks - 1)[: len(case.rows)] + 1).tolist()
        held = np.full((num_blocks, case.width), device.poison)
        states = rng.normal(size=(len(case.rows), case.width)).astype(np.float32)
        for row, block, state in zip(case.rows, blocks, states, strict=True):
            if row.context:
                held[block] = state
        cache = backend.import_arrays(cache, range(num_blocks), {"sum": device.held(held, "float32")})
        view, key = state_rows_view(device, case.rows, blocks, pad_tokens=case.pad_tokens, pad_rows=case.pad_rows)
        shape = (key.num_tokens, case.width)
        x = device.tensor(rng.normal(size=shape), case.dtype)
        gate = device.tensor(rng.uniform(0.0, 1.0, size=shape).round(3), case.dtype)
        return cls(device, case, backend, cache, num_blocks, blocks, states.astype(np.float64), view, key, x, gate)

    def run(self) -> Tensor:
        """The output; the cache is replaced by the one that came back."""
        plan = self.backend.plan(self.view, self.key, group=0)
        layer = StateLayer(index=0, ops=self.device.ops.ops)
        result, self.cache = self.backend.forward({"x": self.x, "gate": self.gate}, self.cache, plan, layer)
        return result

    def held(self) -> Tensor:
        """Every block in canonical form, [num_blocks, width]."""
        return self.backend.export_arrays(self.cache, range(self.num_blocks))["sum"].clone()

    def check(self) -> None:
        """Runs it and judges the output, its padding, the inputs, the rows' states, and every other block."""
        device, case, before = self.device, self.case, self.held()
        same = unchanged(device, {"x": self.x, "gate": self.gate, "state_blocks": self.view.state_blocks})
        result = self.run()
        same()
        shape = (self.key.num_tokens, case.width)
        assert tuple(result.shape) == shape, f"the output has shape {tuple(result.shape)}, expected {shape}"
        assert str(result.dtype) == f"torch.{case.dtype}", f"the output is {result.dtype}"
        x, gate, after, at = seen(self.x), seen(self.gate), self.held(), 0
        for index, row in enumerate(case.rows):
            first = self.states[index] if row.context else np.zeros(case.width)
            mine = slice(at, at + row.query)
            expected = gated_sums(x[mine], gate[mine], first)
            at += row.query
            if not row.query:
                continue
            in_dtype = Bounded(expected.value, expected.bound + rounded(expected.value, case.dtype))
            device.compare(f"output of row {index}", result[mine], in_dtype, label=f"state/{case.dtype}")
            last = Bounded(expected.value[-1], expected.bound[-1])
            device.compare(f"state of row {index}", after[self.blocks[index]], last)
        if device.capabilities.padding == "zero_rows" and at < len(result):
            zero = np.zeros(tuple(result[at:].shape))
            device.compare("padded tokens", result[at:], Bounded(zero, zero))
        written = [block for block, row in zip(self.blocks, case.rows, strict=True) if row.query]
        others = [block for block in range(1, self.num_blocks) if block not in written]
        device.same_bits("states of no row of the step", after[others], before[others])


def gated_sums(x: np.ndarray, gate: np.ndarray, first: np.ndarray) -> Bounded:
    """The recurrence in float64, and how far float32 in any order may be from it: each token adds a product and a sum
    to what went before, and a form that looks at many tokens at once multiplies gates first."""
    sums, sizes, last, size = [], [], first, np.abs(first)
    for added, kept in zip(x, gate, strict=True):
        last, size = kept * last + added, np.abs(kept) * size + np.abs(added)
        sums.append(last)
        sizes.append(size)
    if not sums:
        return Bounded(np.zeros((0, len(first))), np.zeros((0, len(first))))
    growth = np.array([gamma(3.0 * (token + 2)) for token in range(len(sums))])[:, None]
    return Bounded(np.stack(sums), np.stack(sizes) * growth)


def state_rows_view(
    device: Device, rows: Sequence[StateRow], blocks: list[int], *, pad_tokens: int, pad_rows: int
) -> tuple[StateView, ShapeKey]:
    """A step of these rows, padded."""
    queries = [row.query for row in rows]
    num_tokens, num_rows, dummies = sum(queries), len(queries), device.capabilities.padding == "dummy_request"
    key = ShapeKey(
        num_tokens=num_tokens + max(pad_tokens, pad_rows if dummies else 0),
        num_reqs=num_rows + pad_rows,
        num_samples=num_rows,
        max_query_len=max(queries),
        num_pages=1,
    )
    starts = np.full(key.num_reqs + 1, num_tokens)
    starts[: num_rows + 1] = np.concatenate(([0], np.cumsum(queries)))
    lengths = np.zeros(key.num_reqs)
    lengths[:num_rows] = [row.context + row.query if row.query else 0 for row in rows]
    if dummies:
        starts[num_rows:] = np.minimum(num_tokens + np.arange(len(starts) - num_rows), key.num_tokens)
        lengths[num_rows:] = np.diff(starts[num_rows:])
    ids = np.full(key.num_reqs, NULL_BLOCK)
    ids[:num_rows] = blocks
    view = StateView(
        query_start=device.tensor(starts, "int32"),
        seq_lens=device.tensor(lengths, "int32"),
        state_blocks=device.tensor(ids, "int32"),
        num_reqs=key.num_reqs,
        num_tokens=key.num_tokens,
        max_query_len=max(queries),
        host_query_lens=np.asarray(queries, dtype=np.int32),
    )
    return view, key


def poisoned_everywhere(call: StateCall) -> None:
    """Fills every block with what no honest backend reads."""
    held = torch.full((call.num_blocks, call.case.width), call.device.poison)
    arrays = {"sum": held.to(call.device.platform.default_device)}
    call.cache = call.backend.import_arrays(call.cache, range(call.num_blocks), arrays)
