"""Collectives within one group of ranks, made for one purpose. Tensors may be views: see Form in plugin_api/ops.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anychip.errors import Unsupported

if TYPE_CHECKING:
    from torch import Tensor


MAX_SENT = 16
"""Tensors that may be on their way to a rank before `Communicator.send` waits: a pipeline has one for each step in
flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """`ranks` are world ranks in group order; `purpose` names the axis of the mesh along which they lie.

    `store` is where ranks meet: "file:///path" for one host, "tcp://host:port" across hosts, and
    "keyed://host:port?file" where they need the key in a file (ProcessGroupCommunicator knows all three).
    """

    ranks: tuple[int, ...]
    rank: int
    """This process's world rank, one of `ranks`."""
    purpose: str
    max_message_bytes: int
    store: str
    timeout_s: float
    invariant: bool = False

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def group_rank(self) -> int:
        return self.ranks.index(self.rank)


class Communicator:
    """The base class is the group of one: every collective returns its input. A plugin overrides them all."""

    name = "single"

    def __init__(self, spec: GroupSpec) -> None:
        if spec.size > 1 and type(self) is Communicator:
            raise Unsupported("communicator", [f"a group of {spec.size} ranks needs the platform's communicator"])
        self.spec = spec

    @property
    def rank(self) -> int:
        return self.spec.group_rank

    @property
    def size(self) -> int:
        return self.spec.size

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, on every rank. May reuse x's storage. NaN and infinities are in the sum at their own places.
        This and every other result is the caller's: later collectives leave it."""
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Ranks' tensors, all of one shape, concatenated along dim in group order."""
        return x

    def all_gather_v(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        """As all_gather, where rank i brings sizes[i] along dim."""
        return x

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """Sum over ranks; this rank keeps its equal share along dim."""
        return x

    def reduce_scatter_v(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        return x

    def all_to_all(self, x: Tensor) -> Tensor:
        """Equal shares along dim 0: share j goes to rank j."""
        return x

    def all_to_all_v(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """send[j] rows go to rank j, receive[j] rows come from it."""
        return x

    def begin_all_to_all_v(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Callable[[], Tensor]:
        """As all_to_all_v, whose result the function gives that is returned: rows may travel until it is called, beside
        other collectives. x is left alone until then. The default is done with it at once."""
        arrived = self.all_to_all_v(x, send, receive)
        return lambda: arrived

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        """root counts within the group."""
        return x

    def send(self, x: Tensor, to: int) -> None:
        """To a rank of the group, which gets what it is sent in order. Does not wait until that rank asks for it, as
        long as no more than MAX_SENT are on their way to it: two ranks may send to each other at once. x may be written
        to afterwards."""
        raise Unsupported(self.name, ["a group of one has nobody to send to"])

    def recv(self, x: Tensor, source: int) -> Tensor:
        """The oldest that a rank of the group has sent here and that was not received, in x's shape and dtype. Waits
        for it, and may write it to x."""
        raise Unsupported(self.name, ["a group of one has nobody to receive from"])

    def barrier(self) -> None:
        return None

    def register(self, graph_pool: Any) -> None:
        """Called before capture, for communicators whose buffers a graph must know."""
        return

    def close(self) -> None:
        return None

    def restore(self) -> None:
        """Opens the group again after close, as when a sleeping worker wakes."""
        return
