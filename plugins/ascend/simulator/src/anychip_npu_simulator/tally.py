"""How many calls of the vendor's ops passed its schema, the simulator's checks and the vendor's meta function.

    NPU_SIMULATOR_COUNTS=<folder> anychip conformance --device ascend-simulated ...
    python -m anychip_npu_simulator.tally <folder>

Each process writes a file of its own there, so that the processes of a run can be added up.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

_EVERY = 32
"""Calls between two writings, of all ops together: a worker that is killed has written most of them."""


@dataclass(slots=True)
class Count:
    """Calls that passed the schema and the checks; those whose results the vendor's meta function confirmed."""

    calls: int = 0
    confirmed: int = 0


counts: dict[str, Count] = {}
"""By op's name, of this process. Diagnostics: nothing depends on them."""


def add(op: str, confirmed: bool) -> None:
    count = counts.setdefault(op, Count())
    count.calls += 1
    count.confirmed += confirmed
    if sum(count.calls for count in counts.values()) % _EVERY == 1:
        write()


@atexit.register
def write() -> None:
    folder = os.environ.get("NPU_SIMULATOR_COUNTS")
    if folder and counts:
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / f"{os.getpid()}.json"
        path.with_suffix(".new").write_text(json.dumps({op: asdict(count) for op, count in counts.items()}))
        path.with_suffix(".new").rename(path)


def total(folder: Path) -> dict[str, Count]:
    """Of all processes that wrote there, by op."""
    found: dict[str, Count] = {}
    for path in sorted(folder.glob("*.json")):
        for op, count in json.loads(path.read_text()).items():
            sum_ = found.setdefault(op, Count())
            sum_.calls += count["calls"]
            sum_.confirmed += count["confirmed"]
    return found


def main() -> None:
    found = total(Path(sys.argv[1]))
    for op, count in sorted(found.items()):
        sys.stdout.write(f"{op:64} {count.calls:9} calls {count.confirmed:9} confirmed by the vendor's meta function\n")
    calls, confirmed = (sum(getattr(count, name) for count in found.values()) for name in ("calls", "confirmed"))
    sys.stdout.write(f"{calls} calls of {len(found)} ops passed the vendor's schemas; {confirmed} its meta functions\n")


if __name__ == "__main__":
    main()
