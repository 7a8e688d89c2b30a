"""Collectives of the host's processes, which a recorded graph replays like everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from anychip.plugin_api import Communicator, GroupSpec
from anychip.registry.devices import probe
from anychip.registry.plugins import load_plugins
from anychip.worker.open_platform import open_platform

if TYPE_CHECKING:
    from torch import Tensor

_RUNTIME = "cpu"
"""Whose communicator carries the ranks of a simulated platform."""

Run = Callable[[Callable[..., Any], tuple[Any, ...]], Any]
"""Calls a collective with its arguments; while a graph is recorded, as one task of it."""


def host_communicator(group: GroupSpec) -> Communicator:
    if group.size == 1:
        return Communicator(group)
    manifest = load_plugins().platforms[_RUNTIME]
    platform = open_platform(manifest, device_indexes=(0,), options=manifest.options(), probe=probe(manifest))
    return platform.communicator(group)


class RecordedCommunicator(Communicator):
    """What a collective gives is the task's output: a replay calls it again, with what its arguments hold by then."""

    name = "recorded"

    def __init__(self, inner: Communicator, run: Run) -> None:
        super().__init__(inner.spec)
        self.inner, self._run = inner, run

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._tensor(self.inner.all_reduce, x)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return self._tensor(self.inner.all_gather, x, dim)

    def all_gather_v(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        return self._tensor(self.inner.all_gather_v, x, sizes, dim)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        return self._tensor(self.inner.reduce_scatter, x, dim)

    def reduce_scatter_v(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        return self._tensor(self.inner.reduce_scatter_v, x, sizes, dim)

    def all_to_all(self, x: Tensor) -> Tensor:
        return self._tensor(self.inner.all_to_all, x)

    def all_to_all_v(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return self._tensor(self.inner.all_to_all_v, x, send, receive)

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        return self._tensor(self.inner.broadcast, x, root)

    def send(self, x: Tensor, to: int) -> None:
        self._run(self.inner.send, (x, to))

    def recv(self, x: Tensor, source: int) -> Tensor:
        return self._tensor(self.inner.recv, x, source)

    def barrier(self) -> None:
        self._run(self.inner.barrier, ())

    def close(self) -> None:
        self.inner.close()

    def restore(self) -> None:
        self.inner.restore()

    def _tensor(self, collective: Callable[..., Tensor], *arguments: Any) -> Tensor:
        result: Tensor = self._run(collective, arguments)
        return result
