"""Collectives over one of torch's process groups: what every runtime's communicator shares."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from anychip.keyed_sockets import ClusterKey
from anychip.ops.reference.keyed_store import KeyedStore
from anychip.plugin_api import MAX_SENT, Communicator, DeviceFault, GroupSpec, Unsupported

_dist: Any = torch.distributed
"""Its stores and groups come from C++ without types."""


class ProcessGroupCommunicator(Communicator):
    """One process group per GroupSpec, without torch's global default group. A subclass says of which kind."""

    def __init__(self, spec: GroupSpec) -> None:
        super().__init__(spec)
        self._generation = 0
        self._sent: dict[int, deque[tuple[Any, Tensor]]] = {}  # by receiver: what keeps a tensor until it is there
        self._group = self._open()

    @abstractmethod
    def make_group(self, store: Any, timeout: timedelta) -> Any:
        """The runtime's group of this rank, which meets the others at `store`."""

    def _open(self) -> Any:
        spec = self.spec
        kind, _, place = spec.store.partition("://")
        if kind == "file":
            # -1: the number of processes is not checked, since several groups meet in one file.
            store = _dist.FileStore(place, -1)
        elif kind == "tcp":
            host, _, port = place.rpartition(":")
            store = _dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
        elif kind == "keyed":
            address, _, key_file = place.partition("?")
            store = KeyedStore(address, ClusterKey.of_file(key_file), timedelta(seconds=spec.timeout_s))
        else:
            raise Unsupported(
                f"communicator {self.name}", [f"store {spec.store!r}; known are file://, tcp:// and keyed://"]
            )
        # Addresses of a group that was closed stay in the store: one that is opened again meets under a new name.
        name = f"{spec.purpose}-{'-'.join(map(str, spec.ranks))}-{self._generation}"
        return self.make_group(_dist.PrefixStore(name, store), timedelta(seconds=spec.timeout_s))

    def _wait(self, work: Any) -> None:
        with self._peers():
            work.wait()

    @contextmanager
    def _peers(self) -> Iterator[None]:
        """Around what fails where another rank is gone. Raises DeviceFault."""
        try:
            yield
        except RuntimeError as error:
            raise self.fault(f"a rank is gone or did not answer: {error}", "peer_lost") from error

    def fault(self, what: str, kind: str) -> DeviceFault:
        """A failure of the group, which does not recover."""
        spec = self.spec
        return DeviceFault(f"{spec.purpose}, rank {self.rank} of {spec.ranks}: {what}", kind=kind, fatal=True)

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._wait(self._group.allreduce([x]))
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._wait(self._group.allgather([parts], [x]))
        return torch.cat(parts, dim=dim)

    def all_gather_v(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        rows = x.movedim(dim, 0)
        longest = max(sizes)
        padded = x.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = self.all_gather(padded.unsqueeze(0), dim=0)
        kept = torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
        return kept.movedim(0, dim)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        return self.all_reduce(x.clone()).chunk(self.size, dim=dim)[self.rank]

    def reduce_scatter_v(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        mine: Tensor = torch.split(self.all_reduce(x.clone()), list(sizes), dim=dim)[self.rank]
        return mine

    def all_to_all(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        self._wait(self._group.alltoall_base(out, x, [], []))
        return out

    def all_to_all_v(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return self.begin_all_to_all_v(x, send, receive)()

    def begin_all_to_all_v(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Callable[[], Tensor]:
        sent, out = x.contiguous(), x.new_empty((sum(receive), *x.shape[1:]))
        with self._peers():  # a connection that is closed refuses at once
            work = self._group.alltoall_base(out, sent, list(receive), list(send))

        def arrived(sent: Tensor = sent) -> Tensor:  # which keeps what is sent until it is there
            self._wait(work)
            return out

        return arrived

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        x = x.contiguous()
        self._wait(self._group.broadcast(x, root))
        return x

    def send(self, x: Tensor, to: int) -> None:
        sent = x.contiguous().clone()  # the caller goes on, and may write to x
        on_their_way = self._sent.setdefault(to, deque())
        with self._peers():  # a connection that is closed refuses at once
            on_their_way.append((self._group.send([sent], to, 0), sent))
        if len(on_their_way) > MAX_SENT:
            self._wait(on_their_way.popleft()[0])

    def recv(self, x: Tensor, source: int) -> Tensor:
        with self._peers():
            self._group.recv([x], source, 0).wait()
        return x

    def barrier(self) -> None:
        self._wait(self._group.barrier())

    def restore(self) -> None:
        self._generation += 1
        self._sent.clear()
        self._group = self._open()
