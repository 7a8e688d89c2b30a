"""Which slot of the device has which adapter, and which requests may have theirs. Reads no adapter: workers do."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from anychip.request import Request
from anychip.step_messages import AdapterSlot

PATIENCE_S = 2.0
"""A request that has waited so long for its adapter's slot goes first: no other adapter gets more requests before it
has one."""


class AdapterSlots:
    """A request with a slot of the batch holds its adapter's slot of the device. Slots that nobody holds keep their
    adapters until others need them, the one that was not used for longest first. `clock` counts seconds as
    Request.arrived_at does."""

    def __init__(
        self, num_slots: int, *, patience_s: float = PATIENCE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._slots: dict[bytes, int] = {}
        self._holders: dict[bytes, int] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()  # in slots that nobody holds, the oldest first
        self._filled: list[AdapterSlot] = []
        self._patience_s = patience_s
        self._clock = clock
        self.num_loads = 0
        """How often a slot was filled, since the start."""

    def has_room(self, adapter: bytes) -> bool:
        """Whether a request with this adapter may get a slot of the batch."""
        return adapter in self._slots or bool(self._free or self._idle)

    def is_starved(self, request: Request) -> bool:
        """Whether a request has waited for a slot for so long that others must let it pass."""
        return self._clock() - request.arrived_at > self._patience_s

    def take(self, adapter: bytes) -> int:
        """The adapter's slot, which one more request holds from now on. There is room for it."""
        slot = self._slots.get(adapter)
        if slot is None:
            slot = self._free.pop() if self._free else self._slots.pop(self._idle.popitem(last=False)[0])
            self._slots[adapter] = slot
            self._filled.append(AdapterSlot(slot, adapter))
            self.num_loads += 1
        self._idle.pop(adapter, None)
        self._holders[adapter] = self._holders.get(adapter, 0) + 1
        return slot

    def release(self, adapter: bytes) -> None:
        """One request less holds the adapter's slot."""
        self._holders[adapter] -= 1
        if not self._holders[adapter]:
            del self._holders[adapter]
            self._idle[adapter] = None

    def forget(self, adapter: bytes) -> None:
        """The adapter is gone from the host, and nobody holds it: its slot is free."""
        assert adapter not in self._holders, "an adapter in use is dropped"
        if adapter in self._idle:
            del self._idle[adapter]
            self._free.append(self._slots.pop(adapter))
        # A slot that was to be filled by a step that never came must not be.
        self._filled = [filled for filled in self._filled if filled.digest != adapter]

    def refill(self, lost: Sequence[AdapterSlot]) -> None:
        """A step that was to fill slots was not carried out: the next one does, where they still have them."""
        again = [each for each in lost if self._slots.get(each.digest) == each.slot]
        self._filled = again + self._filled

    def take_filled(self) -> list[AdapterSlot]:
        """The slots that the next step fills, told once."""
        filled, self._filled = self._filled, []
        return filled
