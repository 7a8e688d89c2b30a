"""Opens a chosen platform to see what serves its ops, and closes it again. Loads torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from anychip.registry.devices import ChosenDevice


@dataclass(frozen=True, slots=True, kw_only=True)
class OpReport:
    platform: str
    served_by: Mapping[str, str]
    reference_ops: Sequence[str]
    notes: Sequence[str]


def inspect_ops(chosen: ChosenDevice) -> OpReport:
    """Raises what opening the platform raises."""
    opening = import_module("anychip.worker.open_platform")
    platform = opening.open_platform(
        chosen.manifest,
        device_indexes=chosen.indexes,
        options=chosen.options,
        probe=chosen.candidate.probe,
    )
    try:
        with opening.explained(platform):
            table = import_module("anychip.ops.table").resolve_platform_ops(platform)
    finally:
        platform.close("inspected")
    return OpReport(
        platform=platform.name,
        served_by=table.served_by,
        reference_ops=table.reference_ops,
        notes=table.notes,
    )
