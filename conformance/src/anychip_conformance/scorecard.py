"""The scorecard: what a run says of a device, as JSON that is checked when it is read, and as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from anychip_conformance.case import PROFILES
from anychip_conformance.facts import Facts
from anychip_conformance.manifest import Manifest
from anychip_conformance.verdicts import BAD, Outcome, Verdict

EVIDENCE = {
    "hardware": "runs on the hardware",
    "host": "runs on the host's processor, which is the device",
    "cpu_runtime": "runs on the vendor's CPU runtime, not on the device",
    "simulated": "simulated in host memory: no such device exists",
    "unknown": "the device could not be opened",
}
"""By DeviceInfo.backing."""


THROUGH_PROGRAM = frozenset({"step", "e2e"})
"""Sections whose cases run whole steps, and so the step program of a device that has one."""
THROUGH_FACTORIES = frozenset({"op", "attn", "kv", "latent", "state", "encoder", "linear", "moe", "sample", "graph"})
"""Sections that ask a platform's factories. On the step seam those are the reference's or the plugin's own ones for
tracing: what passes there is not said of the compiled program."""


def judged_through(seam: str, case: str) -> str:
    """What a case exercises on the step seam: "program" or "factories"; "" where that makes no difference."""
    section = case.partition(".")[0]
    if seam != "step" or section not in THROUGH_PROGRAM | THROUGH_FACTORIES:
        return ""
    return "program" if section in THROUGH_PROGRAM else "factories"


class Failure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    case: str
    verdict: str
    message: str
    params: str
    reproduce: str
    through: str = ""


class Capability(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`state`: tested, failed, untested (declared, and no case of this run relied on it), reference (on the step seam,
    only cases of the factories relied on it) or refused."""

    name: str
    declared: bool
    state: str
    num_cases: int


class Scorecard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`conforms` by profile: None where the run says nothing of it. `complete` False: cases were chosen by hand."""

    schema: int = 1
    interface: str
    manifest: str
    device: str
    package: str
    seam: str
    evidence: str
    hardware: list[str]
    machine: str
    versions: dict[str, str]
    date: str
    profile: str
    seed: int | None
    deadline_scale: float
    complete: bool
    conforms: dict[str, bool | None]
    counts: dict[str, dict[str, int]]
    capabilities: list[Capability]
    margins: dict[str, float]
    relaxations: list[str]
    failures: list[Failure]
    waived: list[str]
    seconds: float
    reproduce: str
    through: dict[str, int] = {}
    """Of the cases that passed on the step seam: how many through the program, how many through the factories."""


OPTIONAL = frozenset({"latent", "state", "encoder"})
"""Sections of layers that only some models have: a device without them serves all others."""


def empty_sections(outcomes: Sequence[Outcome]) -> list[str]:
    """Sections, the first parts of ids, in which nothing passed and something has to."""
    passed = {outcome.case.partition(".")[0] for outcome in outcomes if outcome.verdict is Verdict.PASS}
    return sorted({outcome.case.partition(".")[0] for outcome in outcomes} - passed - OPTIONAL)


def conforms(outcomes: Sequence[Outcome]) -> bool | None:
    """Of one profile's outcomes: something passed, and nothing failed or was waived. None: it was not judged, or
    nothing of it is supported."""
    verdicts = {outcome.verdict for outcome in outcomes}
    if verdicts & (BAD | {Verdict.WAIVED}):
        return False
    return True if Verdict.PASS in verdicts else None


def by_profile(outcomes: Sequence[Outcome], manifest: Manifest) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {profile: [] for profile in PROFILES}
    for outcome in outcomes:
        found[manifest.cases[outcome.case].profile].append(outcome)
    return found


def counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    return dict(sorted(Counter(outcome.verdict.value for outcome in outcomes).items()))


def worst_margins(outcomes: Sequence[Outcome]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for outcome in outcomes:
        for label, ratio in outcome.margins.items():
            worst[label] = max(worst.get(label, 0.0), ratio)
    return {label: round(worst[label], 4) for label in sorted(worst)}


def passed_through(outcomes: Sequence[Outcome], seam: str) -> dict[str, int]:
    """Empty on the torch seam."""
    found = Counter(judged_through(seam, outcome.case) for outcome in outcomes if outcome.verdict is Verdict.PASS)
    return {name: found[name] for name in ("program", "factories")} if seam == "step" else {}


def through_line(through: Mapping[str, int]) -> str:
    return f"judged through the program: {through['program']}; through reference factories: {through['factories']}"


def capability_rows(outcomes: Sequence[Outcome], facts: Facts | None, seam: str) -> list[Capability]:
    used: Counter[str] = Counter()
    # A case that was refused had met some capabilities before, and judged none of them.
    judged = [outcome for outcome in outcomes if outcome.verdict is not Verdict.NOT_SUPPORTED]
    elsewhere = {name for o in judged if judged_through(seam, o.case) != "factories" for name in o.used}
    failed, refused = set(), set()
    for outcome in judged:
        used.update(outcome.used)
    for outcome in outcomes:
        if outcome.verdict in BAD:
            failed.update(outcome.used)
        if outcome.capability:
            refused.add(outcome.capability)
    declared = list(facts.declared) if facts else []
    rows = []
    for name in [*declared, *sorted(set(used) - set(declared) - refused)]:
        state = "failed" if name in failed else "tested" if name in elsewhere else "reference"
        state = state if used[name] else "untested"
        rows.append(Capability(name=name, declared=True, state=state, num_cases=used[name]))
    for name in sorted(refused | set(facts.undeclared if facts else [])):
        if name not in declared:
            state = "refused" if name in refused else "undeclared"
            rows.append(Capability(name=name, declared=False, state=state, num_cases=0))
    return rows


def write(card: Scorecard, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scorecard.json").write_bytes(msgspec.json.format(msgspec.json.encode(card), indent=2) + b"\n")
    (folder / "scorecard.md").write_text(page(card))


def read(path: Path) -> Scorecard:
    """Raises msgspec.ValidationError where the file is no scorecard."""
    return msgspec.json.decode(path.read_bytes(), type=Scorecard)


def schema() -> bytes:
    """JSON Schema of the file."""
    return msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Scorecard)), indent=2) + b"\n"


# -- the page -------------------------------------------------------------------------------------------------


def verdict_word(value: bool | None) -> str:
    return {True: "conformant", False: "not conformant", None: "not judged"}[value]


def page(card: Scorecard) -> str:
    lines = [
        f"# {card.package} ({card.device})",
        "",
        f"Interface {card.interface}, profile {card.profile}"
        + ("" if card.complete else ", **a selection of cases: this says nothing of conformance**")
        + f". Evidence: {EVIDENCE[card.evidence]}. {card.date}.",
        "",
        f"Hardware: {', '.join(card.hardware) or '-'} on {card.machine or '-'}. "
        + ", ".join(f"{name} {version}" for name, version in card.versions.items())
        + f". Draws: {'fixed' if card.seed is None else f'seed {card.seed}'}. {card.seconds:.0f} s.",
        "",
        f"    {card.reproduce}",
        "",
        f"Manifest `{card.manifest}`.",
        "",
        "## Verdicts",
        "",
        *_table(
            ["profile", "", *[v.value for v in Verdict]],
            [
                [profile, verdict_word(card.conforms[profile]), *[count.get(v.value, 0) for v in Verdict]]
                for profile, count in card.counts.items()
            ],
        ),
        *(["", through_line(card.through)] if card.through else []),
        "",
        "## Capabilities",
        "",
        *_table(
            ["capability", "declared", "state", "cases"],
            [[c.name, "yes" if c.declared else "no", c.state, c.num_cases or "-"] for c in card.capabilities],
        ),
        "",
        "## Worst error over its bound",
        "",
        *_table(["op / dtype", "error / bound"], [[name, f"{ratio:.3f}"] for name, ratio in card.margins.items()]),
        "",
        "## What was relaxed for this device",
        "",
        *([f"- {text}" for text in card.relaxations] or ["Nothing."]),
    ]
    if card.failures:
        lines += ["", "## Failures", ""]
        for failure in card.failures:
            where = f" (through the {failure.through})" if failure.through else ""
            lines += [
                f"**{failure.case}**{where}: {failure.verdict}: {failure.message}",
                "",
                f"    {failure.reproduce}",
                "",
            ]
    if card.waived:
        lines += ["", "## Waived", "", *[f"- {case}" for case in card.waived]]
    return "\n".join(lines).rstrip() + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    body = [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *body]


def matrix(cards: Mapping[str, Scorecard]) -> str:
    """docs/reference/capability-matrix.md, from every committed scorecard by device."""
    names = list(cards)
    capabilities: dict[str, None] = {}
    for card in cards.values():
        capabilities.update(dict.fromkeys(row.name for row in card.capabilities))
    states = {name: {row.name: row for row in card.capabilities} for name, card in cards.items()}

    def cell(device: str, capability: str) -> str:
        row = states[device].get(capability)
        return "-" if row is None else row.state

    order = sorted(capabilities, key=lambda name: (" " in name, name))
    rows: list[list[object]] = [
        ["evidence", *[cards[name].evidence for name in names]],
        ["seam", *[cards[name].seam for name in names]],
        ["date", *[cards[name].date for name in names]],
    ]
    rows += [[f"**{p}** profile", *[verdict_word(cards[name].conforms[p]) for name in names]] for p in PROFILES]
    rows += [[capability, *[cell(name, capability) for name in names]] for capability in order]
    legend = "\n".join(f"- **{key}**: {text}" for key, text in EVIDENCE.items() if key != "unknown")
    return _MATRIX_PAGE.format(legend=legend, table="\n".join(_table(["", *names], rows)))


_MATRIX_PAGE = """# Capability matrix

Made from the scorecards under `conformance/scorecards/` by `make matrix`; not edited by hand. A device that is not here
has no scorecard of this manifest. tpu has run on a CPU device of its vendor's runtime under an earlier one: that
scorecard is kept under `benchmarks/results/tpu`, and those of cuda on other devices under `benchmarks/results/gpu`.
rocm has not run on a device. `make interpreted` judges the kernels of both as triton-interpreter, a simulation; its
scorecard is not of this manifest yet. Neither tpu nor ascend has run on its hardware: ascend-simulated is the plugin
over a simulated NPU.

Evidence:

{legend}

A capability is *tested* (declared, and all that relies on it passed), *failed*, *reference* (on the step seam: only the
platform's factories were tried, not its compiled program), *untested* (declared, and the suite has no case for it),
*refused* (not declared, and its factory says so) or *undeclared*.

{table}
"""
