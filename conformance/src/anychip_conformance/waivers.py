"""Known failures that a vendor may list while mending them. A waiver names one case, and never makes a device
conform."""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path

import msgspec

from anychip.errors import ConfigError
from anychip_conformance.verdicts import Outcome, Verdict


class Waiver(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[[waiver]] of the file. All four are required."""

    case: str
    reason: str
    link: str
    expires: datetime.date


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    waiver: list[Waiver] = []


def read_waivers(path: Path, known: frozenset[str], today: datetime.date) -> dict[str, Waiver]:
    """By case id. Raises ConfigError for an unknown case, one listed twice, an empty reason, or one that expired."""
    try:
        listed = msgspec.convert(tomllib.loads(path.read_text()), _File).waiver
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"--waivers {path}: {error}") from error
    found: dict[str, Waiver] = {}
    for waiver in listed:
        for wrong, problem in (
            (waiver.case not in known, "is no case of this suite; a waiver names exactly one"),
            (waiver.case in found, "is waived twice"),
            (not waiver.reason.strip() or not waiver.link.strip(), "needs a reason and a link"),
            (waiver.expires < today, f"expired on {waiver.expires}; mend it, or set a new date"),
        ):
            if wrong:
                raise ConfigError(f"--waivers {path}: {waiver.case} {problem}")
        found[waiver.case] = waiver
    return found


def waived(outcome: Outcome, waiver: Waiver) -> Outcome:
    """FAIL and CRASH become WAIVED, PASS becomes XPASS."""
    if outcome.verdict in (Verdict.FAIL, Verdict.CRASH):
        return msgspec.structs.replace(
            outcome, verdict=Verdict.WAIVED, message=f"{waiver.reason} ({waiver.link}): {outcome.message}"
        )
    if outcome.verdict is Verdict.PASS:
        return msgspec.structs.replace(
            outcome, verdict=Verdict.XPASS, message=f"passed although it is waived ({waiver.reason}): remove the waiver"
        )
    return outcome
