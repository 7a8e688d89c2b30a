"""Runs one case on an opened device, in this process, and never raises: whatever happens becomes an outcome."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

import hypothesis
import msgspec
import torch

from anychip_conformance.case import Case, Kind
from anychip_conformance.choices import resolved
from anychip_conformance.device import Device
from anychip_conformance.verdicts import Mismatch, Outcome, Refused, Verdict

_FRAMES = 3


def run_case(device: Device, case: Case, *, seed: int | None = None, params: bytes | None = None) -> Outcome:
    """`seed` None draws what it always draws. `params` (JSON) replaces the case's own."""
    start = time.perf_counter()
    device.take_margins()
    device.used.clear()
    given = case.params if params is None else msgspec.json.decode(params, type=case.kind.params)
    tried = Tried(case.kind, device)
    verdict, message, difference, capability = Verdict.PASS, "", None, ""
    try:
        if given is not None:
            tried(given)
        else:
            draw(case.kind, tried, seed)
            if tried.refused and not tried.passed:
                raise tried.refused
    except Refused as refusal:
        verdict, message, capability = Verdict.NOT_SUPPORTED, str(refusal), refusal.capability
    except Mismatch as mismatch:
        verdict, message, difference = Verdict.FAIL, str(mismatch), mismatch.difference
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - SystemExit and the skips of test frameworks are no way out
        verdict, message = Verdict.FAIL, described(error)
    return Outcome(
        case=case.id,
        verdict=verdict,
        message=message,
        seconds=time.perf_counter() - start,
        params=msgspec.Raw(msgspec.json.encode(tried.last)) if verdict is Verdict.FAIL else msgspec.Raw(b"null"),
        difference=difference,
        margins=device.take_margins(),
        used=tuple(sorted(device.used)),
        capability=capability,
    )


class Tried:
    """A kind's check on a device, remembering what it was last tried with. The last failure of a draw is its
    shrunk one."""

    def __init__(self, kind: Kind, device: Device) -> None:
        self.kind = kind
        self.device = device
        self.last: msgspec.Struct | None = None
        self.passed = 0
        self.refused: Refused | None = None

    def __call__(self, params: msgspec.Struct) -> None:
        self.last = params = resolved(params, self.device)
        with torch.inference_mode():
            self.kind.check(self.device, params)
        self.passed += 1

    def or_refused(self, params: msgspec.Struct) -> None:
        try:
            self(params)
        except Refused as refusal:
            self.refused = refusal


def draw(kind: Kind, tried: Tried, seed: int | None) -> None:
    """As many draws as the kind wants. Those that need what the device does not declare count for nothing."""
    assert kind.drawn is not None
    attempt: Callable[[], None] = hypothesis.given(kind.drawn)(tried.or_refused)
    if seed is not None:
        attempt = hypothesis.seed(seed)(attempt)
    hypothesis.settings(
        max_examples=kind.examples,
        derandomize=seed is None,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(hypothesis.HealthCheck),
    )(attempt)()


def described(error: BaseException) -> str:
    """Type, text and the innermost frames."""
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    where = "; ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in frames)
    return f"{type(error).__name__}: {error} ({where})"
