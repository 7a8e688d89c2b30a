"""Does the conformance suite cry wolf? Draws its tier B from many seeds on backends that are honest, runs its visits of
large sizes and its views with as many, and counts the cases that fail.

python benchmarks/false_alarms.py --seeds 20 --out benchmarks/results/false-alarms.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from anychip.bench.report import write
from anychip_conformance.device import open_device
from anychip_conformance.form_checks import FormCase
from anychip_conformance.registry import all_cases
from anychip_conformance.run import run_case
from anychip_conformance.verdicts import Verdict
from anychip_conformance.visits import VisitCase

DEVICES = ("cpu", "fake-static", "fake-hostlen", "fake-spmd")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--devices", nargs="+", default=list(DEVICES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    alarms = []
    for name in arguments.devices:
        device = open_device(name, {})
        verdicts: Counter[str] = Counter()
        margins: dict[str, float] = {}
        examples, start = 0, time.perf_counter()
        for seed in range(1, arguments.seeds + 1):
            for case in all_cases():
                if case.params is not None and not isinstance(case.params, VisitCase | FormCase):
                    continue
                params = None
                if case.params is not None:
                    params = msgspec.json.encode(msgspec.structs.replace(case.params, seed=seed))
                outcome = run_case(device, case, seed=seed, params=params)
                verdicts[outcome.verdict.value] += 1
                if outcome.verdict is Verdict.PASS:
                    examples += case.kind.examples if params is None else 1
                for label, ratio in outcome.margins.items():
                    margins[label] = max(margins.get(label, 0.0), round(ratio, 4))
                if outcome.verdict is Verdict.FAIL:
                    alarms.append([name, seed, outcome.case, outcome.message, bytes(outcome.params).decode()])
                    print("ALARM", *alarms[-1], flush=True)
        device.close()
        found[name] = {
            "verdicts": dict(verdicts),
            "examples": examples,
            "seconds": round(time.perf_counter() - start, 1),
            "worst_error_over_bound": dict(sorted(margins.items())),
        }
        print(name, found[name]["verdicts"], found[name]["seconds"], "s", flush=True)
    if arguments.out:
        write(arguments.out, {"seeds": arguments.seeds, "devices": found, "alarms": alarms})
    return 1 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())
