"""A point in the work that a device was given, which the host may wait for."""

from __future__ import annotations


class Event:
    """A point in the device's work. The base class is the point that has passed."""

    def wait(self) -> None:
        """Blocks the host until the point has passed."""

    def query(self) -> bool:
        return True
