"""One call of a state layer of any recurrence: its inputs, a poisoned pool with each row's state; and its judgement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from anychip.plugin_api import RECURRENCES, ShapeKey, StateBackend, StateLayer, StateSpec, StateView, state_spec
from anychip_conformance.choices import CaseDtype
from anychip_conformance.device import Device, seen, unchanged
from anychip_conformance.oracle.recurrences import advanced
from anychip_conformance.oracle.rounding import rounded
from anychip_conformance.oracle.vectorised import Bounded
from anychip_conformance.state_calls import StateRow, state_rows_view

_SPARE_BLOCKS = 3
DIMS = {
    "channels": 12,
    "width": 4,
    "past": 3,
    "state_dim": 6,
    "heads": 4,
    "groups": 2,
    "head_dim": 5,
    "key_dim": 8,
    "value_dim": 6,
}
"""Sizes of the dimensions that plugin_api.RECURRENCES names."""
_RANGES = {
    "dt": (0.01, 0.5),
    "gate": (0.0, 1.0),
    "g": (-0.3, 0.0),
    "beta": (0.0, 1.0),
    "slope": (0.05, 0.5),
}
"""Of what must lie in a range. The others are drawn from a normal distribution."""


class RecurrenceCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    recurrence: str
    rows: tuple[StateRow, ...]
    dtype: CaseDtype = "any"
    pad_tokens: int = 0
    pad_rows: int = 0
    seed: int = 0

    @property
    def spec(self) -> StateSpec:
        return state_spec(self.recurrence, self.dtype, **DIMS)  # type: ignore[arg-type]


def recurrence_backend(device: Device, case: RecurrenceCase) -> StateBackend:
    """The backend, once every capability that the case needs is declared."""
    device.need_dtype(case.dtype)
    declared = case.recurrence in device.capabilities.recurrences
    device.need(f"recurrence {case.recurrence}", declared, lambda: device.platform.state(case.spec))
    return device.platform.state(case.spec)


@dataclass(slots=True)
class RecurrenceCall:
    """A call that is made, and not yet run. `states` by row are those before it, float64, and `blocks` theirs."""

    device: Device
    case: RecurrenceCase
    backend: StateBackend
    layer: StateLayer
    cache: Any
    num_blocks: int
    blocks: list[int]
    states: list[np.ndarray]
    view: StateView
    key: ShapeKey
    inputs: dict[str, Tensor]

    @classmethod
    def make(cls, device: Device, case: RecurrenceCase) -> RecurrenceCall:
        backend, rng = recurrence_backend(device, case), np.random.default_rng(case.seed)
        num_blocks = 1 + len(case.rows) + _SPARE_BLOCKS
        raw = device.platform.empty((num_blocks * backend.state_bytes(),), "uint8", "kv")
        (array,) = case.spec.arrays
        blocks = (rng.permutation(num_blocks - 1)[: len(case.rows)] + 1).tolist()
        held = np.full((num_blocks, *array.shape), device.poison)
        for row, block in zip(case.rows, blocks, strict=True):
            if row.context:
                held[block] = rng.normal(size=array.shape)
        given = device.held(held, str(array.dtype))
        cache = backend.import_arrays(backend.make_cache(raw, num_blocks), range(num_blocks), {array.name: given})
        view, key = state_rows_view(device, case.rows, blocks, pad_tokens=case.pad_tokens, pad_rows=case.pad_rows)
        known = RECURRENCES[case.recurrence]
        weights = {
            name: device.held(_drawn(name, shape, rng), _dtype(case, name)) for name, shape in known.weights.items()
        }
        inputs = {
            name: device.tensor(_drawn(name, shape, rng, key.num_tokens), _dtype(case, name))
            for name, shape in known.inputs.items()
        }
        if case.recurrence == "wkv7":
            inputs |= {
                name: device.tensor(values, _dtype(case, name)) for name, values in _contracted(inputs, rng).items()
            }
        states = [
            seen(given[block]) if row.context else np.zeros(array.shape)
            for row, block in zip(case.rows, blocks, strict=True)
        ]
        layer = StateLayer(index=0, ops=device.ops.ops, weights=weights)
        return cls(device, case, backend, layer, cache, num_blocks, blocks, states, view, key, inputs)

    @property
    def array(self) -> str:
        return self.case.spec.arrays[0].name

    def run(self) -> Tensor:
        """The output; the cache is replaced by the one that came back."""
        plan = self.backend.plan(self.view, self.key, group=0)
        result, self.cache = self.backend.forward(self.inputs, self.cache, plan, self.layer)
        return result

    def held(self) -> Tensor:
        """Every block in canonical form."""
        return self.backend.export_arrays(self.cache, range(self.num_blocks))[self.array].clone()

    def put(self, blocks: Sequence[int], states: Tensor) -> None:
        self.cache = self.backend.import_arrays(self.cache, blocks, {self.array: states})

    def expected(self, tokens: slice, first: np.ndarray) -> tuple[Bounded, Bounded]:
        """Output and last state of a sequence's tokens; `first` is the state before them."""
        found = advanced(
            self.case.recurrence,
            {name: seen(given[tokens]) for name, given in self.inputs.items()},
            {name: seen(given) for name, given in self.layer.weights.items()},
            first,
        )
        output = Bounded(found.output.value, found.output.bound + rounded(found.output.value, self.case.dtype))
        if self.array in RECURRENCES[self.case.recurrence].narrow:
            return output, found.state
        return output, Bounded(found.state.value, found.state.bound + rounded(found.state.value, "float32"))

    def check(self) -> None:
        """Runs it and judges the output, its padding, the inputs, the rows' states, and every other block."""
        device, case, before = self.device, self.case, self.held()
        same = unchanged(device, {**self.inputs, **self.layer.weights, "state_blocks": self.view.state_blocks})
        result = self.run()
        same()
        like = self.inputs[RECURRENCES[case.recurrence].like]
        assert result.shape == like.shape, f"the output has shape {tuple(result.shape)}, expected {tuple(like.shape)}"
        assert result.dtype == like.dtype, f"the output is {result.dtype}"
        after, at = self.held(), 0
        for index, row in enumerate(case.rows):
            mine, at = slice(at, at + row.query), at + row.query
            output, last = self.expected(mine, self.states[index])
            label = f"{case.recurrence}/{case.dtype}"
            device.compare(f"output of row {index}", result[mine], output, label=label)
            device.compare(f"state of row {index}", after[self.blocks[index]], last)
        if device.capabilities.padding == "zero_rows" and at < len(result):
            zero = np.zeros(tuple(result[at:].shape))
            device.compare("padded tokens", result[at:], Bounded(zero, zero))
        others = [block for block in range(1, self.num_blocks) if block not in self.blocks]
        device.same_bits("states of no row of the step", after[others], before[others])


def _dtype(case: RecurrenceCase, name: str) -> str:
    return "float32" if name in RECURRENCES[case.recurrence].wide else case.dtype


def _drawn(name: str, shape: Sequence[str], rng: np.random.Generator, *leading: int) -> np.ndarray:
    sizes = (*leading, *(DIMS[dim] for dim in shape))
    if name == "a" and not leading:  # a weight, whose exponentials are decays
        return -rng.uniform(0.1, 1.0, size=sizes)
    return rng.uniform(*_RANGES[name], size=sizes) if name in _RANGES else rng.normal(size=sizes)


def _contracted(inputs: Mapping[str, Tensor], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """a, b and g of the general delta rule as models have them: a state that grows without end says nothing."""
    b = seen(inputs["b"])
    b = b / np.linalg.norm(b, axis=-1, keepdims=True)
    return {"a": -b * rng.uniform(0.0, 0.5, size=(*b.shape[:-1], 1)), "b": b, "g": np.full(b.shape, -0.05)}


def drawn_case(recurrence: str, length: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of so many tokens, weights, and the state before them; float32 on the host."""
    rng, known = np.random.default_rng(length), RECURRENCES[recurrence]

    def made(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).float()

    weights = {name: made(_drawn(name, shape, rng)) for name, shape in known.weights.items()}
    inputs = {name: made(_drawn(name, shape, rng, length)) for name, shape in known.inputs.items()}
    if recurrence == "wkv7":
        inputs |= {name: made(values) for name, values in _contracted(inputs, rng).items()}
    return inputs, weights, {name: made(_drawn(name, shape, rng)) for name, shape in known.arrays.items()}
