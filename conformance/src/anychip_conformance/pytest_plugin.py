"""The pytest plugin `anychip-conformance`: inert unless --device names a platform. Kinds found in a module become
items; each item asks the judge, and its verdict travels with its report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from anychip.errors import AnychipError
from anychip_conformance.case import Case, Kind
from anychip_conformance.verdicts import BAD, Outcome, Verdict

if TYPE_CHECKING:
    from anychip_conformance.session import ConformanceRun

_OUTCOME, _FACTS = "anychip_outcome", "anychip_facts"
_RUN = pytest.StashKey["ConformanceRun"]()
PROFILE_CHOICES = ("quick", "core", "full")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("anychip")
    group.addoption("--device", default=None, help="the platform that anychip's conformance suite judges")
    group.addoption("--device-opt", action="append", default=[], metavar="KEY=VALUE", help="an option of its plugin")
    group.addoption("--profile", default="core", choices=PROFILE_CHOICES, help="which cases run (default: core)")
    group.addoption(
        "--case",
        action="append",
        default=[],
        metavar="ID",
        help="a case, a kind, or a section of the profile",
    )
    group.addoption("--params", default=None, metavar="JSON", help="with --case: these parameters instead of its own")
    group.addoption("--seed", type=int, default=None, help="draw tier B from this seed instead of the fixed one")
    group.addoption("--report", default=None, metavar="DIR", help="write scorecard.json and scorecard.md there")
    group.addoption("--waivers", default=None, metavar="FILE", help="TOML with known failures; never conformant")
    group.addoption("--deadline-scale", type=float, default=1.0, help="multiplies every deadline")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") is None:
        return
    # Not before: an idle plugin must not cost a test session torch's import.
    from anychip_conformance.session import ConformanceRun, Settings

    values = config.option
    try:
        run = ConformanceRun(
            Settings(
                device=values.device,
                options=tuple(values.device_opt),
                profile=values.profile,
                cases=tuple(values.case),
                params=values.params,
                seed=values.seed,
                report=None if values.report is None else Path(values.report),
                waivers=None if values.waivers is None else Path(values.waivers),
                deadline_scale=values.deadline_scale,
            )
        )
    except AnychipError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[_RUN] = run
    config.pluginmanager.register(Verdicts(run))
    if run.manifest.exclusive and getattr(values, "numprocesses", None):
        raise pytest.UsageError(f"{values.device} admits one process at a time: run without -n")


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Collector, name: str, obj: object) -> Any:
    if not isinstance(obj, Kind):
        return None
    run = collector.config.stash.get(_RUN, None)
    if run is None:
        return []
    return [
        ConformanceItem.from_parent(collector, name=case.id, case=case, run=run)
        for case in obj.cases()
        if run.selects(case)
    ]


class ConformanceItem(pytest.Item):
    def __init__(self, *, case: Case, run: ConformanceRun, **rest: Any) -> None:
        super().__init__(**rest)
        self.case = case
        self.run = run

    def runtest(self) -> None:
        outcome = self.run.judged(self.case)
        self.user_properties.append((_OUTCOME, msgspec.json.encode(outcome).decode()))
        if self.run.facts is not None:
            self.user_properties.append((_FACTS, msgspec.json.encode(self.run.facts).decode()))
        if outcome.verdict is Verdict.NOT_SUPPORTED:
            pytest.skip(f"not supported: {outcome.message}")
        if outcome.verdict is Verdict.WAIVED:
            pytest.skip(f"waived: {outcome.message}")
        if outcome.verdict in BAD:
            raise NotPassed(self.run.explained(outcome))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, NotPassed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, self.case.id


class NotPassed(Exception):
    """A verdict that keeps the device from conforming."""


class Verdicts:
    """Gathers what the items report, from wherever they ran, and judges the run at its end."""

    def __init__(self, run: ConformanceRun) -> None:
        self.run = run
        self.outcomes: list[Outcome] = []
        self.facts: Any = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        from anychip_conformance.facts import Facts

        for name, value in report.user_properties if report.when == "call" else ():
            if name == _OUTCOME:
                self.outcomes.append(msgspec.json.decode(str(value), type=Outcome))
            elif name == _FACTS:
                self.facts = msgspec.json.decode(str(value), type=Facts)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.run.close()
        if not hasattr(session.config, "workerinput") and not self.run.finish(self.outcomes, self.facts):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section(f"conformance of {self.run.manifest.name}")
        for line in self.run.summary():
            terminalreporter.write_line(line)
