"""A compiled call of fake-static: a tape of the ops of one signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anychip_conformance.fakes.recorded import refuse_host_read


class UncompiledShape(RuntimeError):
    """A step of a shape that was not compiled for."""


class CompiledCall:
    """Takes exactly the shapes and dtypes of its example, and cannot read a value on the host.

    It is traced when it is first called. A run calls few of the programs that its warm-up compiled; tracing them all
    would take most of the run's time.
    """

    def __init__(self, fn: Callable[..., object], example: tuple[object, ...]) -> None:
        self._signature = _signature(example)
        self._untraced: tuple[Callable[..., object], tuple[object, ...]] | None = (fn, example)

    def trace(self) -> None:
        """Once, over the example's values: those of a call cannot get onto the tape."""
        if self._untraced is None:
            return
        fn, example = self._untraced
        self._tape = Tape(_tensors(example))
        with self._tape:
            self._result = self._tape.placed(fn(*example))
        self._tape.end()
        self._untraced = None

    def __call__(self, *arguments: object) -> tuple[Any, ...]:
        given = _signature(arguments)
        if given != self._signature:
            wrong = next(pair for pair in zip(given, self._signature, strict=False) if pair[0] != pair[1])
            raise UncompiledShape(f"compiled for {wrong[1]}, called with {wrong[0]}")
        self.trace()
        result: tuple[Any, ...] = filled(self._result, self._tape.run(_tensors(arguments)))
        return result


@dataclass(frozen=True, slots=True)
class Place:
    """Where the run of a tape holds a tensor."""

    index: int


@dataclass(frozen=True, slots=True)
class Taped:
    op: Callable[..., Any]
    arguments: Any
    keywords: Any
    outputs: tuple[int, ...]


class Tape(TorchDispatchMode):
    """The ops that run inside it, in order, with a place for each tensor that is given or made. A tensor from
    elsewhere, such as a weight, is a constant.

    make_fx of torch records the same ops. It notes more of each one, and takes twenty times as long.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self._taped: list[Taped] = []
        self._seen: list[Tensor] = []  # by place; alive while the tape grows, so that an id is one tensor's
        self._places: dict[int, int] = {}
        for tensor in given:
            self._place(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        refuse_host_read(func)
        if func is torch.ops.aten.lift_fresh.default:
            func = torch.ops.aten.clone.default  # a constant stays as it is, whatever is done to what came of it
        arguments, keywords = self.placed(args), self.placed(kwargs or {})
        output = func(*args, **(kwargs or {}))
        outputs = tuple(self._place(tensor) for tensor in _tensors(output))
        self._taped.append(Taped(func, arguments, keywords, outputs))
        return output

    def _place(self, tensor: Tensor) -> int:
        self._places[id(tensor)] = len(self._seen)
        self._seen.append(tensor)
        return len(self._seen) - 1

    def placed(self, value: Any) -> Any:
        """The value with a Place for every tensor that has one."""

        def place(tensor: Tensor) -> Place | Tensor:
            index = self._places.get(id(tensor))
            return tensor if index is None else Place(index)

        return _mapped(value, Tensor, place)

    def end(self) -> None:
        """Lets the tensors go that were made while it grew."""
        self._seen, self._places = [], {}

    def run(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of a run, by place."""
        held = list(given)
        for taped in self._taped:
            output = taped.op(*filled(taped.arguments, held), **filled(taped.keywords, held))
            held.extend([output] if isinstance(output, Tensor) else _tensors(output))
        return held


def filled(value: Any, held: Sequence[Tensor]) -> Any:
    """The value with the tensor of every Place."""
    return _mapped(value, Place, lambda place: held[place.index])


def _mapped(value: Any, kind: type, fn: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return fn(value)
    if isinstance(value, tuple | list):
        return type(value)([_mapped(each, kind, fn) for each in value])
    if isinstance(value, dict):
        return {name: _mapped(each, kind, fn) for name, each in value.items()}
    return value


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, tuple | list) else []


def _signature(arguments: object) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(tensor.shape), tensor.dtype) for tensor in _tensors(arguments)]
