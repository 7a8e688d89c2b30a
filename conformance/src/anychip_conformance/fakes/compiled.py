"""A compiled call of fake-static: an FX graph of one signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx


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
        """Once, over the example's values: those of a call cannot get into the graph."""
        if self._untraced is None:
            return
        fn, example = self._untraced
        # One mode for the shapes that the tracer notes at every node: it would make a new one each time.
        with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
            self._graph = make_fx(fn)(*example)
        self._untraced = None

    def __call__(self, *arguments: object) -> tuple[Any, ...]:
        given = _signature(arguments)
        if given != self._signature:
            wrong = next(pair for pair in zip(given, self._signature, strict=False) if pair[0] != pair[1])
            raise UncompiledShape(f"compiled for {wrong[1]}, called with {wrong[0]}")
        self.trace()
        result: tuple[Any, ...] = self._graph(*arguments)
        return result


def _signature(arguments: object) -> list[tuple[tuple[int, ...], torch.dtype]]:
    if isinstance(arguments, Tensor):
        return [(tuple(arguments.shape), arguments.dtype)]
    if isinstance(arguments, Mapping):
        arguments = list(arguments.values())
    assert isinstance(arguments, list | tuple)
    return [entry for argument in arguments for entry in _signature(argument)]
