"""One call of an npu:: op: its arguments by name, the checks that every op shares, the vendor's second opinion, counts.

The vendor's schema has been applied before a kernel is called: the dispatcher does it. An op of the simulator is a
check and a computation on the host's aliases; this module runs them in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from anychip_npu_simulator import graphs, tally
from anychip_npu_simulator.errors import Disagreement, Refused
from anychip_npu_simulator.machine import GENERATIONS, machine
from anychip_npu_simulator.memory import convert, device, host, is_nz, tensors

ATLAS_A2_A3 = ("910B", "910C", "950")
"""The documents' "Atlas A2" and "Atlas A3", and what follows them."""
EVERYWHERE = GENERATIONS


class Arguments:
    """A call's arguments by the schema's names, defaults filled in. Tensors are the host's aliases; `given` has the
    tensors of the device."""

    def __init__(self, op: Simulated, values: Mapping[str, Any]) -> None:
        self.op, self.given = op, dict(values)
        for name, value in values.items():
            setattr(self, name, convert(value, host))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.op.name} has no argument {name}")

    def refuse(self, argument: str, value: object, allowed: str) -> Refused:
        return Refused(self.op.name, argument, value, allowed)

    def check(self, holds: object, argument: str, value: object, allowed: str) -> None:
        if not holds:
            raise self.refuse(argument, value, allowed)

    def dtype(self, argument: str, *allowed: torch.dtype) -> None:
        """Every tensor of the argument is of an allowed dtype; an argument that is None passes."""
        for tensor in tensors(getattr(self, argument)):
            names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
            self.check(tensor.dtype in allowed, argument, tensor.dtype, names)

    def dims(self, argument: str, *allowed: int) -> None:
        for tensor in tensors(getattr(self, argument)):
            self.check(tensor.dim() in allowed, argument, f"of shape {tuple(tensor.shape)}", f"{allowed} dimensions")

    def shape(self, argument: str, *allowed: tuple[int, ...]) -> None:
        for tensor in tensors(getattr(self, argument)):
            self.check(tuple(tensor.shape) in allowed, argument, f"of shape {tuple(tensor.shape)}", f"{list(allowed)}")

    def contiguous(self, *arguments: str) -> None:
        for argument in arguments:
            for tensor in tensors(getattr(self, argument)):
                self.check(tensor.is_contiguous(), argument, f"of strides {tensor.stride()}", "a contiguous tensor")

    def only(self, argument: str, *allowed: Any) -> None:
        """A scalar argument has one of the values."""
        self.check(getattr(self, argument) in allowed, argument, repr(getattr(self, argument)), f"{list(allowed)}")

    def absent(self, *arguments: str) -> None:
        """Features of the vendor's op that the simulator does not have, or that must be left out together."""
        for argument in arguments:
            self.check(getattr(self, argument) is None, argument, "given", "None in this simulator")

    def nz(self, argument: str) -> bool:
        return any(is_nz(tensor) for tensor in tensors(self.given[argument]))


@dataclasses.dataclass(frozen=True, slots=True)
class Simulated:
    """`name` with overload; `document` is what the semantics come from. `nz`: arguments that may be FRACTAL_NZ.
    `host_lengths`: host arguments that differ from step to step and that a graph freezes. `opinion`: the op
    whose meta function is asked in place of one that the vendor does not have; `results` False: for its refusals
    alone, as the results are other ones."""

    name: str
    check: Callable[[Arguments], None]
    compute: Callable[[Arguments], Any]
    document: str
    products: tuple[str, ...] = ATLAS_A2_A3
    nz: tuple[str, ...] = ()
    host_lengths: tuple[str, ...] = ()
    opinion: str = ""
    results: bool = True


OPS: dict[str, Simulated] = {}


def simulates(name: str, check: Callable[[Arguments], None], document: str, **options: Any) -> Any:
    """Registers the decorated computation as the op's kernel."""

    def register(compute: Callable[[Arguments], Any]) -> Callable[[Arguments], Any]:
        OPS[name] = Simulated(f"npu::{name}", check, compute, document, **options)
        return compute

    return register


class Kernel:
    """What the dispatcher calls."""

    def __init__(self, op: Simulated, overload: Any, opinion: Any | None) -> None:
        """`opinion`: the overload whose meta function is asked, if there is one."""
        self.op, self.opinion = op, opinion
        self.schema = overload._schema
        self.defaults = {a.name: a.default_value if a.has_default_value() else None for a in self.schema.arguments}
        self.names = [a.name for a in self.schema.arguments]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}
        given = Arguments(self.op, values)
        where = self._common(given, values)
        self.op.check(given)
        expected = self._second_opinion(values) if self.opinion is not None else None
        out = self._given_out(values)
        if graphs.updating():  # the device takes the new arguments and computes at the next replay
            graphs.update(self.op, given)
            tally.add(self.op.name, self.opinion is not None)
            return out
        result = self.op.compute(given)
        if expected is not None and self.op.results:
            self._compare(result, expected)
        tally.add(self.op.name, self.opinion is not None)
        answer = out if out is not None else convert(result, lambda values: device(values, where))
        if out is not None:
            for target, value in zip(tensors(out), tensors(result), strict=True):
                host(target).copy_(value)
        if graphs.active():
            graphs.record_npu(self.op, given, [host(t) for t in tensors(answer)] if result is not None else [])
        return answer

    def _common(self, given: Arguments, values: dict[str, Any]) -> torch.device:
        generation = machine().generation
        if generation not in self.op.products:
            products = ", ".join(self.op.products)
            raise given.refuse("generation", generation, f"the vendor documents this op for {products}")
        where: torch.device | None = None
        for name, value in values.items():
            for tensor in tensors(value):
                where = where or tensor.device
                allowed = f"tensors of one device, here {where}"
                given.check(
                    tensor.device.type == "npu" and tensor.device == where, name, f"on {tensor.device}", allowed
                )
                if generation == "310P":
                    given.check(tensor.dtype != torch.bfloat16, name, "bfloat16", "float16 or float32 on a 310P")
                if name not in self.op.nz:
                    given.check(not is_nz(tensor), name, "FRACTAL_NZ", "ND; npu_format_cast(tensor, 2) makes it so")
        assert where is not None and where.type == "npu", "the dispatcher came here by a tensor of the device"
        return where

    def _given_out(self, values: dict[str, Any]) -> Any:
        """Tensors that the caller gave for results (variants `.out`)."""
        out = values.get("out") if "out" in self.names else None
        return tuple(out) if isinstance(out, list) else out

    def _second_opinion(self, values: dict[str, Any]) -> list[Tensor]:
        """Shapes and dtypes by the vendor's meta function. Its own refusals name no argument and pass through."""
        on_meta = convert(values, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"))
        arguments = self.opinion._schema.arguments
        keywords = {a.name: on_meta[a.name] for a in arguments if a.kwarg_only}
        positional = [on_meta[a.name] for a in arguments if not a.kwarg_only]
        try:
            return tensors(self.opinion(*positional, **keywords))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise Refused(self.op.name, "arguments", "refused by the vendor's meta function", str(error)) from error

    def _compare(self, result: Any, expected: list[Tensor]) -> None:
        mine = [(tuple(t.shape), t.dtype) for t in tensors(result)]
        theirs = [(tuple(t.shape), t.dtype) for t in expected]
        if mine != theirs:
            raise Disagreement(f"{self.op.name}: the simulator gives {mine}, the vendor's meta function {theirs}")
