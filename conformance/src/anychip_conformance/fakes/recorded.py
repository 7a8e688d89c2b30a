"""What a simulated device may record: ops of torch, of which none reads a value on the host."""

from __future__ import annotations

from typing import Any

_HOST_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
_HOST_COPIES = ("aten::lift_fresh", "aten::lift")


class HostReadInCapture(RuntimeError):
    """A recorded region asked for a value, which the device does not have yet."""


class HostCopyInCapture(RuntimeError):
    """A recorded region brought a value from the host, which a device would wait for, or copy once and never again."""


def refuse_host_read(op: Any) -> None:
    if op.name().startswith(_HOST_READS):
        raise HostReadInCapture(f"{op.name()} reads a value on the host")


def refuse_host_copy(op: Any) -> None:
    if op.name().startswith(_HOST_COPIES):
        raise HostCopyInCapture(f"{op.name()} copies a value from the host")
