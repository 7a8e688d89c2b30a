"""One run of the suite: which cases, their judge, their verdicts, and the scorecard at the end."""

from __future__ import annotations

import datetime
import difflib
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anychip.entrypoints.cli.options import parse_device_options
from anychip.errors import ConfigError
from anychip.plugin_api import API_VERSION
from anychip_conformance import scorecard
from anychip_conformance.case import Case
from anychip_conformance.device import manifest_of
from anychip_conformance.facts import Facts
from anychip_conformance.judge import Judge
from anychip_conformance.manifest import frozen, selected
from anychip_conformance.scorecard import Failure, Scorecard
from anychip_conformance.verdicts import BAD, Outcome, Verdict
from anychip_conformance.waivers import Waiver, read_waivers, waived


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """As the command line has them."""

    device: str
    options: tuple[str, ...] = ()
    profile: str = "core"
    cases: tuple[str, ...] = ()
    params: str | None = None
    seed: int | None = None
    report: Path | None = None
    waivers: Path | None = None
    deadline_scale: float = 1.0

    @property
    def judging(self) -> list[str]:
        """The command, the device and its options."""
        options = [part for option in self.options for part in ("--device-opt", option)]
        return ["anychip", "conformance", "--device", self.device, *options]

    @property
    def command(self) -> str:
        """What repeats this run."""
        parts = [*self.judging, "--profile", self.profile]
        parts += [part for case in self.cases for part in ("--case", case)]
        if self.seed is not None:
            parts += ["--seed", str(self.seed)]
        return shlex.join(parts)


class ConformanceRun:
    """Raises DeviceUnavailable for a device that is not installed, ConfigError for cases or waivers that are wrong."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.manifest = manifest_of(settings.device)
        options = parse_device_options(settings.options)
        self._judge = Judge(self.manifest, options, deadline_scale=settings.deadline_scale)
        known = frozenset(frozen().cases)
        self._check_cases(known)
        self._waivers: dict[str, Waiver] = {}
        if settings.waivers is not None:
            self._waivers = read_waivers(settings.waivers, known, datetime.date.today())
        self._start = time.perf_counter()
        self.card: Scorecard | None = None
        self._hollow: list[str] = []
        """Sections of Core in which nothing passed."""

    def _check_cases(self, known: frozenset[str]) -> None:
        wider = {id.rpartition(".")[0] for id in known} | {_section(id) for id in known}
        for case in self.settings.cases:
            if case not in known | wider:
                close = difflib.get_close_matches(case, known | wider, n=3)
                raise ConfigError(
                    f"--case {case}: no such case, kind or section"
                    + (f"; did you mean {', '.join(close)}?" if close else "")
                )
        if self.settings.params is not None and len(self.settings.cases) != 1:
            raise ConfigError("--params needs exactly one --case")

    def selects(self, case: Case) -> bool:
        if self.settings.cases:
            if self.settings.params is not None and case.kind.id in self.settings.cases:
                return case is next(case.kind.cases())  # once, whichever of the kind was named
            if case.id in self.settings.cases or case.kind.id in self.settings.cases:
                return True
            if _section(case.id) not in self.settings.cases:
                return False
        return selected(self.settings.profile, case.kind.profile, case.quick)

    def judged(self, case: Case) -> Outcome:
        outcome = self._judge.run(case, seed=self.settings.seed, params=self.settings.params)
        waiver = self._waivers.get(case.id)
        return outcome if waiver is None else waived(outcome, waiver)

    @property
    def facts(self) -> Facts | None:
        return self._judge.facts

    def close(self) -> None:
        self._judge.close()

    # -- the end ------------------------------------------------------------------------------------------

    def finish(self, outcomes: list[Outcome], facts: Facts | None) -> bool:
        """Makes the scorecard, and writes it where --report says. Whether the run succeeded: every verdict good, and
        something passed."""
        manifest, settings = frozen(), self.settings
        complete = not settings.cases
        if complete:
            had = {outcome.case for outcome in outcomes}
            outcomes = outcomes + [
                Outcome(case=id, verdict=Verdict.NOT_RUN, message="the manifest has it, and no verdict came")
                for id in manifest.expected(settings.profile)
                if id not in had
            ]
        outcomes = [outcome for outcome in outcomes if outcome.case in manifest.cases]
        profiles = scorecard.by_profile(outcomes, manifest)
        self._hollow = scorecard.empty_sections(profiles["core"]) if complete else []
        judged = {"quick": [], "core": ["core"], "full": list(profiles)}[settings.profile] if complete else []
        self.card = Scorecard(
            interface=API_VERSION,
            manifest=manifest.sha256,
            device=self.manifest.name,
            package=self.manifest.package,
            seam=self.manifest.seam,
            evidence="unknown" if facts is None else facts.evidence,
            hardware=[] if facts is None else facts.hardware,
            machine="" if facts is None else facts.machine,
            versions={} if facts is None else facts.versions,
            date=datetime.date.today().isoformat(),
            profile=settings.profile,
            seed=settings.seed,
            deadline_scale=settings.deadline_scale,
            complete=complete,
            conforms={
                name: self._conforms(name, found) if name in judged else None for name, found in profiles.items()
            },
            counts={name: scorecard.counts(found) for name, found in profiles.items() if found},
            capabilities=scorecard.capability_rows(outcomes, facts, self.manifest.seam),
            margins=scorecard.worst_margins(outcomes),
            relaxations=[] if facts is None else facts.relaxations,
            failures=[self._failure(outcome) for outcome in outcomes if outcome.verdict in BAD],
            waived=[outcome.case for outcome in outcomes if outcome.verdict is Verdict.WAIVED],
            seconds=round(time.perf_counter() - self._start, 1),
            reproduce=settings.command,
            through=scorecard.passed_through(outcomes, self.manifest.seam),
        )
        if settings.report is not None:
            scorecard.write(self.card, settings.report)
        shown = any(outcome.verdict is Verdict.PASS for outcome in outcomes)
        return shown and not self._hollow and not self.card.failures and False not in self.card.conforms.values()

    def _conforms(self, profile: str, outcomes: list[Outcome]) -> bool | None:
        """Of Core every section must show something."""
        return False if profile == "core" and self._hollow else scorecard.conforms(outcomes)

    def _failure(self, outcome: Outcome) -> Failure:
        return Failure(
            case=outcome.case,
            verdict=outcome.verdict.value,
            message=outcome.message,
            params=bytes(outcome.params).decode(),
            reproduce=self.reproduce(outcome),
            through=scorecard.judged_through(self.manifest.seam, outcome.case),
        )

    def reproduce(self, outcome: Outcome) -> str:
        """One command that runs this case alone, with the parameters it failed with."""
        parts = [*self.settings.judging, "--case", outcome.case]
        if outcome.failed_with:
            parts += ["--params", outcome.failed_with]
        elif self.settings.seed is not None:
            parts += ["--seed", str(self.settings.seed)]
        return shlex.join(parts)

    def explained(self, outcome: Outcome) -> str:
        """What a developer reads below a failing case."""
        through = scorecard.judged_through(self.manifest.seam, outcome.case)
        where = f" (through the {through})" if through else ""
        lines = [f"{outcome.case}{where}: {outcome.verdict.value}: {outcome.message}"]
        if outcome.failed_with:
            lines.append(f"case: {outcome.failed_with}")
        if outcome.difference is not None:
            d = outcome.difference
            error = "not a number" if d.error is None else f"{d.error:.6g}"
            lines.append(f"first bad index {list(d.index)} of {d.what}: error {error}, bound {d.bound:.6g}")
        lines.append(f"alone: {self.reproduce(outcome)}")
        return "\n".join(lines)

    def summary(self) -> Iterator[str]:
        card = self.card
        if card is None:
            return
        for profile, count in card.counts.items():
            shown = ", ".join(f"{number} {verdict}" for verdict, number in count.items())
            word = scorecard.verdict_word(card.conforms[profile]) if card.complete else "selected cases only"
            yield f"{profile}: {shown}: {word}"
        if card.through:
            yield scorecard.through_line(card.through)
        if not any("pass" in count for count in card.counts.values()):
            yield "nothing passed: no conformance without evidence"
        if self._hollow:
            yield f"nothing passed in {', '.join(self._hollow)}: who refuses all of a section does not serve models"
        for failure in card.failures:
            yield f"{failure.verdict} {failure.case}: {failure.reproduce}"
        if self.settings.report is not None:
            yield f"scorecard: {self.settings.report / 'scorecard.md'}"


def _section(case_id: str) -> str:
    """attn of attn.window.001."""
    return case_id.partition(".")[0]
