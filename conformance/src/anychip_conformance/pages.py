"""Writes what docs/reference says of conformance: the capability matrix, and the list of cases.

python -m anychip_conformance.pages docs/reference conformance/scorecards
"""

from __future__ import annotations

import sys
from pathlib import Path

from anychip_conformance import scorecard
from anychip_conformance.faulty.registry import all_faults
from anychip_conformance.manifest import frozen
from anychip_conformance.registry import all_kinds

MATRIX, CASES = "capability-matrix.md", "conformance-cases.md"
_SECTIONS = {
    "attn": "Attention",
    "comm": "Communicators",
    "e2e": "End to end",
    "graph": "Graphs",
    "isolation": "Isolation",
    "kv": "KV cache",
    "latent": "Latent attention",
    "encoder": "Attention of encoders",
    "linear": "Matrix products",
    "moe": "Mixture of experts",
    "op": "Ops",
    "sample": "Sampling",
    "shape": "Shapes",
    "state": "State layers",
    "step": "Steps",
}
"""By the first part of a case's id."""


def matrix(scorecards: Path) -> str:
    cards = {path.parent.name: scorecard.read(path) for path in sorted(scorecards.glob("*/scorecard.json"))}
    return scorecard.matrix(cards)


def cases() -> str:
    """Every kind with its cases, and the faults that it has been seen to kill."""
    killed: dict[str, list[str]] = {}
    for fault in all_faults().values():
        killed.setdefault(fault.killed_by.rpartition(".")[0], []).append(fault.summary)
    manifest = frozen()
    lines = [
        "# Conformance cases",
        "",
        f"The {len(manifest.cases)} cases of interface {manifest.interface}, made by `make matrix` from the suite.",
        "A case's id is its kind and a number, or `drawn` for the one that draws new parameters. *Kills* are planted",
        "faults that the suite's own tests see this kind kill.",
    ]
    section = ""
    for kind in sorted(all_kinds(), key=lambda kind: kind.id):
        if kind.id.partition(".")[0] != section:
            section = kind.id.partition(".")[0]
            lines += ["", f"## {_SECTIONS[section]}"]
        found = list(kind.cases())
        numbers = f"001 to {len(kind.corpus):03}" if len(kind.corpus) > 1 else "001"
        drawn = f" and drawn ({kind.examples} examples)" if len(found) > len(kind.corpus) else ""
        lines += ["", f"### {kind.id}", "", f"{kind.protects} *{kind.profile.capitalize()}*, cases {numbers}{drawn}."]
        if kind.id in killed:
            lines += ["", "Kills:", "", *[f"- {summary}" for summary in killed[kind.id]]]
    return "\n".join(lines) + "\n"


def main(reference: str, scorecards: str) -> int:
    (Path(reference) / MATRIX).write_text(matrix(Path(scorecards)))
    (Path(reference) / CASES).write_text(cases())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
