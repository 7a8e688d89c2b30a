"""What the suite says of one case: a verdict, and everything needed to see why and to run it again."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec


class Verdict(enum.StrEnum):
    """PASS and FAIL are the check's. NOT_SUPPORTED: the device does not declare what the case needs, and its factory
    refuses it. CRASH: the process ended or answered too late. WAIVED: failed, and a waiver names it. XPASS: passed
    although a waiver names it, which counts as a failure. NOT_RUN: in the manifest, and no verdict came."""

    PASS = "pass"
    FAIL = "fail"
    NOT_SUPPORTED = "not_supported"
    WAIVED = "waived"
    XPASS = "xpass"
    CRASH = "crash"
    NOT_RUN = "not_run"


BAD = frozenset({Verdict.FAIL, Verdict.XPASS, Verdict.CRASH, Verdict.NOT_RUN})
"""Verdicts that keep a device from conforming."""


class Difference(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The first element beyond its bound. `error` None: not a number, which JSON does not have."""

    what: str
    index: tuple[int, ...]
    actual: str
    expected: str
    error: float | None
    bound: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One case's verdict. `margins` holds the worst error over its bound by "op/dtype"; `params` is the failing
    case, shrunk where it was drawn."""

    case: str
    verdict: Verdict
    message: str = ""
    seconds: float = 0.0
    params: msgspec.Raw = msgspec.Raw(b"null")
    difference: Difference | None = None
    margins: Mapping[str, float] = {}
    used: tuple[str, ...] = ()
    """Declared capabilities that the case relied on."""
    capability: str = ""
    """What the device does not declare and its factory refused, of a case that is not supported."""

    @property
    def failed_with(self) -> str:
        """`params` as JSON; "" of a case that has none or did not fail."""
        text = bytes(self.params).decode()
        return "" if text in ("null", "{}") else text


class Mismatch(AssertionError):
    """A result beyond its bound."""

    def __init__(self, difference: Difference) -> None:
        self.difference = difference
        error = "not a number" if difference.error is None else f"{difference.error:.3g}"
        super().__init__(
            f"{difference.what} at {list(difference.index)}: got {difference.actual}, expected {difference.expected}; "
            f"error {error}, bound {difference.bound:.3g}"
        )


class Refused(Exception):
    """The case is left out. `capability` is what the device does not declare, and its factory refused as it should; ""
    where there was nobody to ask. Raised by the suite alone."""

    def __init__(self, capability: str, message: str) -> None:
        self.capability = capability
        super().__init__(message)
