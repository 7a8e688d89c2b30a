"""Runs the checks of other kinds over tensors of another form: a property of every kernel, whatever it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from anychip_conformance.case import Kind
from anychip_conformance.choices import CaseDtype, resolved, seeded
from anychip_conformance.device import Device
from anychip_conformance.forms import FORMS, Form
from anychip_conformance.verdicts import Mismatch, Refused


class FormCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`only`: one kind of those that the case goes through. `seed`: of other values."""

    form: Form
    dtype: CaseDtype = "any"
    only: str = ""
    seed: int = 0


def every_form(*dtypes: CaseDtype) -> list[FormCase]:
    return [FormCase(form=form, dtype=dtype) for dtype in dtypes or ("any", "narrow") for form in FORMS]


@dataclass(frozen=True)
class Formed:
    """A kind, and which of its parameters are tried in every form."""

    kind: Kind
    params: tuple[msgspec.Struct, ...]


def formed(kinds: Sequence[Kind], *, most: int = 1) -> tuple[Formed, ...]:
    """The first `most` parameters of each kind that differ in more than the dtype."""
    return tuple(Formed(kind, _distinct(kind)[:most]) for kind in kinds)


def _distinct(kind: Kind) -> tuple[msgspec.Struct, ...]:
    found = {msgspec.json.encode(_in_dtype(params, "any")): params for params in reversed(kind.corpus)}
    return tuple(reversed(found.values()))


def _in_dtype(params: msgspec.Struct, dtype: CaseDtype) -> msgspec.Struct:
    return msgspec.structs.replace(params, dtype=dtype) if hasattr(params, "dtype") else params


def check_formed(device: Device, kinds: Sequence[Formed], case: FormCase) -> None:
    """A kind that the device refuses is left out; raises Refused where it refuses all."""
    passed, refused = 0, Refused("", f"no kind is called {case.only}")
    for each in kinds:
        if case.only not in ("", each.kind.id):
            continue
        for params in each.params:
            try:
                with device.formed(case.form):
                    made = seeded(_in_dtype(params, case.dtype), case.seed)
                    each.kind.check(device, resolved(made, device))
                passed += 1
            except Refused as refusal:
                refused = refusal
            except Exception as error:
                raise within(error, f"{each.kind.id} of {case.form} tensors") from error
    if not passed:
        raise refused


def within(error: Exception, where: str) -> Exception:
    """The same failure, which says where among many checks of one case it was."""
    if isinstance(error, Mismatch):
        return Mismatch(msgspec.structs.replace(error.difference, what=f"{where}: {error.difference.what}"))
    return AssertionError(f"{where}: {type(error).__name__}: {error}")


def kinds_of(*modules: Any, besides: Sequence[Kind] = ()) -> list[Kind]:
    """Every kind of some files of cases."""
    return [
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, Kind) and all(kind is not other for other in besides)
    ]
