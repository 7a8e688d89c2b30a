"""Lists what a step does: calls of compiled kernels, which are made again together, and between them what torch does,
made again one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from anychip.plugin_api import EagerCall, PlannedCall
from anychip_cpu.arena import Arena
from anychip_cpu.native import Kernels
from anychip_cpu.torch_ops import as_kernel

_aten = torch.ops.aten
_EMPTY = frozenset({
    _aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default, _aten.empty_strided.default,
    _aten.new_empty_strided.default,
})  # fmt: skip
_ZEROS = frozenset({_aten.zeros.default, _aten.new_zeros.default, _aten.zeros_like.default})
_INDEXED = frozenset(
    {_aten.index.Tensor, _aten._index_put_impl_.default, _aten.index_put.default, _aten.index_put_.default}
)
"""Whose result has a known shape unless an index is a mask."""
_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

_READ_BY = frozenset({Tensor.tolist, Tensor.numpy, Tensor.__array__})
"""Reach a tensor's memory without an operator."""

Piece = Callable[[Sequence[Any], int], None]
"""Takes the step's plans and its tokens."""


class Unrecordable(RuntimeError):
    """What a step does depends on values that a kernel has yet to compute."""


@dataclass(frozen=True, slots=True)
class Native:
    """Calls of compiled kernels."""

    kernels: Kernels
    recording: object
    first: int
    last: int

    def __call__(self, plans: Sequence[Any], num_tokens: int) -> None:
        self.kernels.replay(self.recording, self.first, self.last, num_tokens)


@dataclass(frozen=True, slots=True)
class TorchCall:
    """A call of one of torch's operators. `outputs` are what it made, where it was not given that."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    outputs: tuple[Tensor, ...]

    def __call__(self, plans: Sequence[Any], num_tokens: int) -> None:
        result = self.run(*self.arguments, **self.keywords)
        for held, made in zip(self.outputs, tensors_of(result), strict=False):
            held.copy_(made)


@dataclass(frozen=True, slots=True)
class Between:
    """A call that is made anew each time."""

    eager: EagerCall

    def __call__(self, plans: Sequence[Any], num_tokens: int) -> None:
        self.eager(plans)


class Recording(TorchDispatchMode):
    """Within its context, kernels are listed and not run, and torch's operators are run and listed. Nothing of what a
    kernel would compute is there yet, so a value that is read raises Unrecordable. `whole`: what torch does between
    kernels is done for padding too, which what runs outside may look at."""

    def __init__(self, kernels: Kernels, arena: Arena, num_tokens: int, *, whole: bool = False) -> None:
        super().__init__()
        self.pieces: list[Piece] = []
        self.paused = False
        self._kernels = kernels
        self._arena = arena
        self._num_tokens = num_tokens
        self._whole = whole
        self._listed = kernels.new_recording(num_tokens)
        self._num_listed = 0
        self._reads = _Reads(self)
        self._kept: dict[int, Tensor] = {}  # by address: of storage that is not the arena's, and that kernels may read

    def __enter__(self) -> Recording:
        super().__enter__()
        self._reads.__enter__()
        self._kernels.record(self._listed)
        return self

    def __exit__(self, *raised: Any) -> None:
        self._kernels.record()
        self._reads.__exit__(*raised)
        super().__exit__(*raised)
        self._end_native()

    def between(self, call: PlannedCall, plans: Sequence[Any]) -> Tensor:
        """Makes a call now, and at every replay with that step's plans."""
        self._kernels.record()
        self.paused = True
        try:
            result = call(plans, None)
            out = self._arena.empty(tuple(result.shape), result.dtype)
        finally:
            self.paused = False
            self._kernels.record(self._listed)
        self._add(Between(EagerCall(call, out)))
        return out

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        self.paused = True
        try:
            return self._listed_call(func, args, kwargs or {})
        finally:
            self.paused = False

    def _listed_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func._can_decompose():  # of inference mode: outside it, torch takes such operators apart before
            self.paused = False
            super().__enter__()
            try:
                return func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        if _reads_values(func, args):
            raise Unrecordable(f"{func} depends on a value")
        output = func(*args, **kwargs)
        if func in _EMPTY or func in _ZEROS:
            return self._blank(func, output)
        if func._schema.is_mutable:
            self._add(TorchCall(func, args, kwargs, ()))
            return output
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((args, kwargs))}
        made = list(tensors_of(output))
        if not all(tensor.untyped_storage().data_ptr() in given for tensor in made):
            if (written := self._by_kernel(func, output, args, kwargs)) is not None:
                return written
            self._add(TorchCall(func, args, kwargs, tuple(made)))
        self._keep(made)
        return output

    def _by_kernel(self, func: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The result in storage of the arena, which a kernel writes at every replay; None: no kernel has the operator,
        or nothing says that its rows are the step's tokens."""
        if not isinstance(output, Tensor) or not output.dim():
            return None
        given = list(tensors_of((args, kwargs)))
        of_tokens = output.shape[0] == self._num_tokens and not output.dtype.is_floating_point
        if not of_tokens and not any(map(self._arena.holds, given)):
            return None
        write = as_kernel(func, output, args, kwargs, whole=self._whole)
        if write is None:
            return None
        out = self._arena.empty(tuple(output.shape), output.dtype)
        out.copy_(output)
        self._keep(given)
        write(self._kernels, out, self._whole)
        return out

    def _keep(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if not self._arena.holds(tensor):
                self._kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    def _blank(self, func: Any, like: Tensor) -> Tensor:
        if not like.is_contiguous() or like.device.type != "cpu":
            self._keep([like])
            out = like
        else:
            out = self._arena.empty(tuple(like.shape), like.dtype)
        if func in _ZEROS:
            self._add(TorchCall(_aten.zero_.default, (out,), {}, ()))
        return out

    def _add(self, piece: Piece) -> None:
        self._end_native()
        self.pieces.append(piece)

    def _end_native(self) -> None:
        """What kernels were called since the last piece is one."""
        count = self._kernels.num_recorded(self._listed)
        if count > self._num_listed:
            self.pieces.append(Native(self._kernels, self._listed, self._num_listed, count))
            self._num_listed = count


class _Reads(TorchFunctionMode):
    """Refuses what reads a value and is no operator."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READ_BY and not self._recording.paused:
            raise Unrecordable(f"Tensor.{func.__name__} depends on a value")
        return func(*args, **(kwargs or {}))


def tensors_of(values: Any) -> Iterator[Tensor]:
    """Those within lists, tuples and dicts, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_of(value)
    elif isinstance(values, dict):
        yield from tensors_of(list(values.values()))


def _reads_values(func: Any, args: tuple[Any, ...]) -> bool:
    if func in _INDEXED:
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors_of(args[1]))
    return any(tag in func.tags for tag in _READS)
