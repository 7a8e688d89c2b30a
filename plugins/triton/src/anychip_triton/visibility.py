"""Which devices a variable of the environment leaves to be seen. Imports nothing heavy: probes ask it."""

from __future__ import annotations

from collections.abc import Sequence


def visible(setting: str | None, uuids: Sequence[str]) -> list[int]:
    """The driver's indexes in the runtime's order: all without a setting; otherwise those that it names, by number or
    by the start of a UUID, up to the first that does not exist."""
    if setting is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for name in filter(None, (part.strip() for part in setting.split(","))):
        if name.isdigit():
            matches = [int(name)] if int(name) < len(uuids) else []
        else:
            matches = [index for index, uuid in enumerate(uuids) if uuid.startswith(name)]
        if len(matches) != 1:
            break
        chosen += matches
    return chosen
