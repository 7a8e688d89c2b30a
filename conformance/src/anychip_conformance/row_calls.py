"""Calls of every kind in one form: row by row in, row by row out. For cases that look at who shares a batch, or at when
a result is read, and not at what a kernel computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from anychip.ops.reference import blank_stacks, write_adapters
from anychip.plugin_api import (
    MAX_BIASES,
    ActFormat,
    AdaptedPart,
    AdapterEntry,
    AdapterSite,
    Communicator,
    GroupSpec,
    LinearPart,
    LinearSpec,
    LowRank,
    QKNorm,
    Rope,
    Span,
)
from anychip_conformance.device import Device

Given = Mapping[str, Tensor]
_HEADS, _HEAD_DIM = 3, 16
_EPS = 1e-5


@dataclass(slots=True)
class RowCall:
    """`rows` are the places of each row in every input and result. `held` gives what storage keeps of a row after a
    run. `ids` are results that are ids, and how many ids there are. `kept` False: the call may overwrite its inputs,
    and give them back as results."""

    inputs: dict[str, Tensor]
    run: Callable[[Given], dict[str, Tensor]]
    rows: list[slice]
    held: Callable[[int], Tensor] | None = None
    ids: dict[str, int] = field(default_factory=dict)
    kept: bool = True


Maker = Callable[[], RowCall]
"""Makes the same call anew, in storage of its own."""


def each(count: int) -> list[slice]:
    """Rows of one place each."""
    return [slice(row, row + 1) for row in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSizes:
    rows: int
    width: int
    dtype: str
    seed: int = 0


class OpCalls:
    """A call of each op, by name."""

    def __init__(self, device: Device, sizes: OpSizes) -> None:
        self._device, self._sizes = device, sizes
        self._rng = np.random.default_rng(sizes.seed)
        self._ops = device.ops.ops

    def make(self, name: str) -> RowCall:
        call: RowCall = getattr(self, name)()
        return call

    def _normal(self, *shape: int, dtype: str = "") -> Tensor:
        return self._device.tensor(self._rng.normal(size=shape), dtype or self._sizes.dtype)

    def _call(self, inputs: dict[str, Tensor], run: Callable[[Given], dict[str, Tensor]], **more: Any) -> RowCall:
        return RowCall(inputs, run, each(self._sizes.rows), **more)

    def rms_norm(self) -> RowCall:
        x, weight = self._normal(self._sizes.rows, self._sizes.width), self._normal(self._sizes.width)
        return self._call({"x": x}, lambda g: {"norm": self._ops.rms_norm(x=g["x"], weight=weight, eps=_EPS)})

    def residual_norm_quant(self) -> RowCall:
        shape, weight = (self._sizes.rows, self._sizes.width), self._normal(self._sizes.width)
        plain = ActFormat(dtype=self._sizes.dtype)  # type: ignore[arg-type]

        def run(g: Given) -> dict[str, Tensor]:
            norm, total = self._ops.residual_norm_quant(
                x=g["x"], residual=g["residual"], weight=weight, eps=_EPS, out_format=plain
            )
            return {"norm": norm, "residual": total}

        return self._call({"x": self._normal(*shape), "residual": self._normal(*shape)}, run, kept=False)

    def gated_activation(self) -> RowCall:
        gate_up = self._normal(self._sizes.rows, 2 * self._sizes.width)
        return self._call(
            {"x": gate_up},
            lambda g: {"activation": self._ops.gated_activation(gate_up=g["x"], activation="silu")},
        )

    def gate_up_act_quant(self) -> RowCall:
        gate_up, plain = self._normal(self._sizes.rows, 2 * self._sizes.width), ActFormat(dtype=self._sizes.dtype)  # type: ignore[arg-type]

        def run(g: Given) -> dict[str, Tensor]:
            found = self._ops.gate_up_act_quant(gate_up=g["x"], activation="gelu_tanh", out_format=plain)
            return {"activation": found}

        return self._call({"x": gate_up}, run, kept=False)

    def softcap(self) -> RowCall:
        x = self._normal(self._sizes.rows, self._sizes.width)
        return self._call({"x": x}, lambda g: {"softcap": self._ops.softcap(x=g["x"], cap=5.0)})

    def _rope(self) -> tuple[Tensor, Rope]:
        angles = np.arange(100)[:, None] * 50.0 ** (-np.arange(_HEAD_DIM // 2) / (_HEAD_DIM / 2))
        tables = [self._device.tensor(part, "float32") for part in (np.cos(angles), np.sin(angles))]
        positions = self._device.tensor(self._rng.integers(0, 100, self._sizes.rows), "int32")
        return positions, Rope(cos=tables[0], sin=tables[1], rotary_dim=_HEAD_DIM)

    def rotary(self) -> RowCall:
        positions, rope = self._rope()
        x = self._normal(self._sizes.rows, _HEADS, _HEAD_DIM)
        return self._call({"x": x}, lambda g: {"turned": self._ops.rotary(x=g["x"], positions=positions, rope=rope)})

    def qkv_norm_rope(self) -> RowCall:
        positions, rope = self._rope()
        norm = QKNorm(q_weight=self._normal(_HEAD_DIM), k_weight=self._normal(_HEAD_DIM), eps=_EPS)

        def run(g: Given) -> dict[str, Tensor]:
            q, k = self._ops.qkv_norm_rope(q=g["q"], k=g["k"], positions=positions, rope=rope, qk_norm=norm)
            assert k is not None, "no keys came back"
            return {"q": q, "k": k}

        rows = self._sizes.rows
        inputs = {"q": self._normal(rows, 2 * _HEADS, _HEAD_DIM), "k": self._normal(rows, _HEADS, _HEAD_DIM)}
        return self._call(inputs, run, kept=False)

    def apply_token_masks(self) -> RowCall:
        rows, vocab = self._sizes.rows, self._sizes.width
        words = self._rng.integers(-(2**31), 2**31, (rows, -(-vocab // 32)))
        masks = self._device.tensor(words, "int32")

        def run(g: Given) -> dict[str, Tensor]:
            return {"logits": self._ops.apply_token_masks(logits=g["logits"], masks=masks)}

        return self._call({"logits": self._normal(rows, vocab, dtype="float32")}, run, kept=False)

    def edit_logits(self) -> RowCall:
        rows, vocab, device, rng = self._sizes.rows, self._sizes.width, self._device, self._rng
        numbers = {
            "slots": (rng.permutation(rows), "int32"),
            "counts": (rng.integers(0, 5, (rows, vocab)), "int32"),
            "repetition_penalty": (rng.uniform(0.5, 2.0, rows), "float32"),
            "presence_penalty": (rng.uniform(-1.0, 1.0, rows), "float32"),
            "frequency_penalty": (rng.uniform(-1.0, 1.0, rows), "float32"),
            "bias_ids": (np.stack([rng.permutation(MAX_BIASES) % vocab for _ in range(rows)]), "int32"),
            "biases": (rng.normal(size=(rows, MAX_BIASES)), "float32"),
            "num_biases": (rng.integers(0, 4, rows), "int32"),
        }
        fixed = {name: device.tensor(values, dtype) for name, (values, dtype) in numbers.items()}
        return self._call(
            {"logits": self._normal(rows, vocab, dtype="float32")},
            lambda g: {"logits": self._ops.edit_logits(logits=g["logits"], **fixed)},
        )

    def logprobs(self) -> RowCall:
        rows, vocab = self._sizes.rows, self._sizes.width
        chosen = self._device.tensor(self._rng.integers(0, vocab, rows), "int32")

        def run(g: Given) -> dict[str, Tensor]:
            own, ids, top = self._ops.logprobs(logits=g["logits"], token_ids=chosen, num_top=min(20, vocab))
            return {"chosen": own, "likeliest ids": ids, "likeliest": top}

        logits = self._normal(rows, vocab, dtype="float32")
        return self._call({"logits": logits}, run, ids={"likeliest ids": vocab})

    def embedding(self) -> RowCall:
        """Rows of the table are what may be bad: the ids name each row once."""
        rows, width = self._sizes.rows, self._sizes.width
        ids = self._device.tensor(np.arange(rows), "int32")
        return self._call(
            {"weight": self._normal(rows, width)},
            lambda g: {"embedding": self._ops.embedding(ids=ids, weight=g["weight"])},
        )

    def matmul_reduce(self) -> RowCall:
        spec = LinearSpec(
            in_features=self._sizes.width,
            out_features=24,
            parts=(LinearPart(name="o", offset=0, rows=24),),
            dtype=self._sizes.dtype,  # type: ignore[arg-type]
        )
        kernel = self._device.platform.linear(spec)
        packed = kernel.begin()
        kernel.load(packed, "o", self._normal(24, self._sizes.width))
        packed = kernel.finish(packed)
        comm = Communicator(
            GroupSpec(ranks=(0,), rank=0, purpose="tp", max_message_bytes=2**16, store="", timeout_s=1.0)
        )

        def run(g: Given) -> dict[str, Tensor]:
            found = self._ops.matmul_reduce(x=g["x"], kernel=kernel, packed=packed, communicator=comm)
            return {"product": found}

        return self._call({"x": self._normal(self._sizes.rows, self._sizes.width)}, run)

    def add_low_rank(self) -> RowCall:
        return self.low_rank(None)

    def low_rank(self, bad_slot: int | None) -> RowCall:
        """No slot and the three slots, by token in turns; the adapter of `bad_slot` is NaN."""
        self._device.need("lora", self._device.capabilities.lora)
        rows, width, slots = self._sizes.rows, self._sizes.width, 3
        site = AdapterSite(
            index=0,
            in_features=width,
            columns=Span(0, width),
            out_features=24,
            parts=(AdaptedPart(module="o", rows=24, held=Span(0, 24), offset=0),),
            dtype=self._sizes.dtype,  # type: ignore[arg-type]
        )
        (stack,) = blank_stacks(
            [site], slots, 8, lambda shape, dtype: self._device.platform.empty(shape, dtype, "adapters")
        )
        adapters = [
            AdapterEntry(slot, {"o": LowRank(self._normal(4, width).cpu(), self._normal(24, 4).cpu(), 0.5)})
            for slot in range(slots)
        ]
        write_adapters([stack], [site], adapters)
        if bad_slot is not None:
            stack.down[bad_slot].fill_(float("nan"))
            stack.up[bad_slot].fill_(float("nan"))
        chosen = self._device.tensor(np.arange(rows) % (slots + 1) - 1, "int32")

        def run(g: Given) -> dict[str, Tensor]:
            return {"sum": self._ops.add_low_rank(x=g["x"], y=g["y"], stack=stack, slots=chosen)}

        return self._call({"x": self._normal(rows, width), "y": self._normal(rows, 24)}, run, kept=False)


OP_CALLS = tuple(name for name in vars(OpCalls) if not name.startswith("_") and name not in ("make", "low_rank"))
"""Names of the ops that have a call."""
