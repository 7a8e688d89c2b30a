"""Host memory that steps are built in: a ring of buffers, each one copy to the device, reused when that is done."""

from __future__ import annotations

import numpy as np

from anychip.plugin_api import Event, Platform

_SMALLEST = 4096


class StagingRing:
    """`depth` buffers, grown when a step needs more. The event of a buffer's last use is waited for before it is
    written again."""

    def __init__(self, platform: Platform, *, depth: int) -> None:
        self._platform = platform
        self._buffers: list[np.ndarray] = [np.empty(0, dtype=np.uint8)] * depth
        self._owners: list[object] = [None] * depth
        self._events: list[Event] = [platform.event()] * depth
        self._next = 0

    def take(self, nbytes: int) -> np.ndarray:
        """The next buffer's first bytes."""
        index = self._next
        self._next = (index + 1) % len(self._buffers)
        self._events[index].wait()
        if len(self._buffers[index]) < nbytes:
            tensor = self._platform.pinned(max(_SMALLEST, 1 << (nbytes - 1).bit_length()))
            self._owners[index] = tensor  # keeps the memory that the array shows
            self._buffers[index] = tensor.numpy()
        return self._buffers[index][:nbytes]

    def used(self) -> None:
        """Marks the work issued so far as the last use of the buffer taken last."""
        self._events[self._next - 1] = self._platform.event()
