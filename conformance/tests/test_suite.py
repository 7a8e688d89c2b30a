"""The suite's own promises: inert without a device, every case in the manifest, failures that can be run again, waivers
that never make a device conform, scorecards that are checked."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packages import anychip, judged, make_bad

from anychip.errors import ConfigError
from anychip.plugin_api import StepProgram
from anychip.worker.model_source import CheckpointSource
from anychip_conformance import manifest, pages, registry, scorecard
from anychip_conformance.device import open_device
from anychip_conformance.facts import Facts
from anychip_conformance.host_watch import HostWatch
from anychip_conformance.manifest import frozen
from anychip_conformance.registry import CASES, all_cases, find_case
from anychip_conformance.run import run_case
from anychip_conformance.session import ConformanceRun, Settings
from anychip_conformance.verdicts import Outcome, Verdict
from anychip_conformance.waivers import read_waivers, waived

ROOT = Path(__file__).parents[2]
HONEST = ("cpu", "fake-static", "fake-hostlen", "fake-spmd", "fake-mesh")
TODAY = datetime.date(2026, 1, 1)


# -- collecting -----------------------------------------------------------------------------------------------


def test_the_suite_is_inert_without_a_device() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "anychip_conformance.cases"]
    for plugin in ("cloudcoil", "langsmith_plugin", "schemathesis"):  # other libraries', which take seconds to load
        command += ["-p", f"no:{plugin}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout


def test_every_case_is_in_the_manifest_as_it_is() -> None:
    assert manifest.differences() == [], "run python -m anychip_conformance.manifest"


def test_a_manifest_that_was_edited_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited = tmp_path / "manifest.json"
    edited.write_text(manifest.PATH.read_text().replace('"quick": true', '"quick": false', 1))
    monkeypatch.setattr(manifest, "PATH", edited)
    manifest.frozen.cache_clear()
    with pytest.raises(AssertionError, match="was edited"):
        manifest.frozen()
    manifest.frozen.cache_clear()


@pytest.mark.parametrize("name", sorted(path.name for path in CASES.glob("test_*.py")))
def test_a_deleted_file_of_cases_is_noticed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in CASES.glob("test_*.py"):
        if path.name != name:
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(registry, "CASES", tmp_path)
    registry.all_kinds.cache_clear()
    try:
        missing = manifest.differences()
    finally:
        registry.all_kinds.cache_clear()
    assert missing and all("in no file" in text for text in missing)


def test_a_case_without_a_verdict_does_not_conform() -> None:
    """Whoever left it out: a deleted file, a filter of pytest's, a worker that was lost."""
    run = ConformanceRun(Settings(device="fake-static"))
    core = manifest.frozen().expected("core")
    passed = [Outcome(case=id, verdict=Verdict.PASS) for id in core]
    assert run.finish(passed, None)
    assert not run.finish(passed[1:], None)
    assert run.card is not None and run.card.conforms["core"] is False
    assert [(failure.case, failure.verdict) for failure in run.card.failures] == [(core[0], "not_run")]
    run.close()


def test_a_device_that_admits_one_process_is_not_judged_by_several(tmp_path: Path) -> None:
    make_bad(tmp_path, "lonely", ONE_DTYPE.format(dtype="float32"))
    hooks = tmp_path / "anychip_lonely" / "__init__.py"
    hooks.write_text(hooks.read_text().replace("PlatformManifest(name", "PlatformManifest(exclusive=True, name"))
    case = ["--case", "op.softcap.001"]
    assert anychip(["conformance", "--device", "lonely", *case], tmp_path).returncode == 0
    refused = anychip(["conformance", "--device", "lonely", *case, "-n", "2"], tmp_path)
    assert refused.returncode != 0
    assert "one process at a time" in refused.stdout + refused.stderr


def test_an_unknown_case_is_refused_with_what_is_near() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*attn\.decode"):
        ConformanceRun(Settings(device="cpu", cases=("attn.decod",)))


def test_a_section_is_what_the_profile_has_of_it(tmp_path: Path) -> None:
    chosen = ["--profile", "quick", "--case", "shape", "--case", "op.softcap.001"]
    done = anychip(["conformance", "--device", "cpu", *chosen, "--report", str(tmp_path)])
    assert done.returncode == 0, done.stdout
    quick = [case for case in frozen().cases if case.startswith("shape.")]
    card = json.loads((tmp_path / "scorecard.json").read_text())
    assert 1 < sum(card["counts"]["core"].values()) <= len(quick) + 1


def test_an_unknown_device_is_refused() -> None:
    done = anychip(["conformance", "--device", "nothing"])
    assert done.returncode != 0
    assert "'nothing' is not installed" in done.stdout + done.stderr


# -- verdicts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [*HONEST[:2], *(pytest.param(name, marks=pytest.mark.full) for name in HONEST[2:])])
def test_an_honest_device_passes_the_quick_profile(device: str) -> None:
    done = anychip(["conformance", "--device", device, "--profile", "quick"])
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_device_of_host_lengths_passes_a_part_of_the_quick_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sections in which it differs from the others: lengths from the host, no indexed writes, recorded graphs."""
    sections = ("attn", "kv", "shape", "step.cotenants.001", "e2e.greedy.001")
    card, succeeded = judged(Settings(device="fake-hostlen", profile="quick", cases=sections), monkeypatch)
    assert succeeded, card.failures
    assert card.counts["core"]["pass"] > 50


@pytest.mark.parametrize("device", ["cuda", "rocm", "tpu", "ascend"])
def test_what_a_plugin_says_of_itself_is_judged_without_its_device(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ("isolation.hook_import", "isolation.probe", "isolation.platform_import")
    card, succeeded = judged(Settings(device=device, cases=(*own, "op.softcap.001")), monkeypatch)
    assert not succeeded
    assert [failure.case for failure in card.failures] == ["op.softcap.001"]
    assert "the device does not open" in card.failures[0].message
    assert card.counts["core"]["pass"] == 3 and card.evidence == "unknown"


ONE_DTYPE = """
from anychip.plugin_api import Capabilities, Platform

class BadPlatform(Platform):
    capabilities = Capabilities(
        dtypes=frozenset({{{dtype!r}}}), kv_dtypes=frozenset({{{dtype!r}}}), head_dims=frozenset({{64, 128}})
    )

    def kv_budget(self, profile):
        return 2**26
"""


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.full), "bfloat16"])
def test_a_device_of_one_dtype_and_few_head_dims_is_judged_in_what_it_has(tmp_path: Path, dtype: str) -> None:
    make_bad(tmp_path, "narrow", ONE_DTYPE.format(dtype=dtype))
    report = ["--report", str(tmp_path)]
    done = anychip(["conformance", "--device", "narrow", "--profile", "quick", *report], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    count = scorecard.read(tmp_path / "scorecard.json").counts["core"]
    assert count["pass"] > 100  # what it leaves out are other dtypes, and layers that it has none of


def test_a_failure_says_what_why_and_how_to_run_it_again(tmp_path: Path) -> None:
    fault = ["--device", "fake-faulty", "--device-opt", "fault=attn-window-one-more"]
    done = anychip(["conformance", *fault, "--case", "attn.window.drawn", "--report", str(tmp_path)])
    assert done.returncode == 1
    assert "attn.window.drawn: fail: output of row" in done.stdout
    assert 'case: {"rows":' in done.stdout
    assert "first bad index [" in done.stdout and "bound " in done.stdout
    failure = scorecard.read(tmp_path / "scorecard.json").failures[0]
    assert failure.reproduce in done.stdout
    command = shlex.split(failure.reproduce)
    assert command[0] == "anychip" and "--params" in command
    again = anychip(command[1:])
    assert again.returncode == 1
    assert "attn.window.drawn: fail: output of row" in again.stdout


def test_a_draw_is_the_same_every_time_and_another_with_a_seed() -> None:
    device = open_device("fake-faulty", {"fault": "attn-values-summed-in-bf16"})
    case = find_case("attn.mixed.drawn")
    assert case is not None
    first, second = (run_case(device, case) for _ in range(2))
    assert (first.verdict, first.params, first.margins) == (second.verdict, second.params, second.margins)
    assert run_case(device, case, seed=3).margins != run_case(device, case, seed=4).margins
    device.close()


def test_computing_on_the_host_is_seen_where_the_device_is_another() -> None:
    """What isolation.no_fallback looks through, on a machine without an accelerator: meta stands for one."""
    with HostWatch("meta") as watch:
        torch.ones(4, 4) * 2
        assert not watch.found, "small tensors are bookkeeping"
        torch.ones(64, 64) * 2
    assert "aten::mul.Tensor" in watch.found
    with HostWatch("cpu") as blind:
        torch.ones(64, 64) * 2
    assert not blind.found


# -- waivers --------------------------------------------------------------------------------------------------

WAIVER = '[[waiver]]\ncase = "{case}"\nreason = "{reason}"\nlink = "https://example.com/1"\nexpires = {expires}\n'


def test_a_waiver_turns_a_failure_and_never_conforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "waivers.toml"
    path.write_text(WAIVER.format(case="attn.window.001", reason="driver 3.1", expires="2999-01-01"))
    settings = Settings(
        device="fake-faulty",
        options=("fault=attn-window-one-more",),
        cases=("attn.window.001", "op.softcap.001"),
        waivers=path,
    )
    card, succeeded = judged(settings, monkeypatch)
    assert succeeded and card.waived == ["attn.window.001"]
    outcomes = [Outcome(case="a", verdict=Verdict.PASS), Outcome(case="b", verdict=Verdict.WAIVED)]
    assert scorecard.conforms(outcomes) is False


def test_a_waived_case_that_passes_is_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "waivers.toml"
    path.write_text(WAIVER.format(case="op.softcap.001", reason="driver 3.1", expires="2999-01-01"))
    waiver = read_waivers(path, frozenset({"op.softcap.001"}), TODAY)["op.softcap.001"]
    assert waived(Outcome(case="op.softcap.001", verdict=Verdict.PASS), waiver).verdict is Verdict.XPASS
    crashed = waived(Outcome(case="op.softcap.001", verdict=Verdict.CRASH), waiver)
    assert crashed.verdict is Verdict.WAIVED and "driver 3.1" in crashed.message


@pytest.mark.parametrize(
    ("case", "reason", "expires", "said"),
    [
        ("attn.window", "r", "2999-01-01", "is no case"),
        ("attn.*", "r", "2999-01-01", "is no case"),
        ("op.softcap.001", " ", "2999-01-01", "needs a reason"),
        ("op.softcap.001", "r", "2025-12-31", "expired on 2025-12-31"),
    ],
)
def test_a_waiver_is_exact_reasoned_and_ends(tmp_path: Path, case: str, reason: str, expires: str, said: str) -> None:
    path = tmp_path / "waivers.toml"
    path.write_text(WAIVER.format(case=case, reason=reason, expires=expires))
    with pytest.raises(ConfigError, match=said.replace("*", r"\*")):
        read_waivers(path, frozenset({"op.softcap.001"}), TODAY)


# -- scorecards and pages -------------------------------------------------------------------------------------


def test_committed_scorecards_are_of_this_manifest() -> None:
    paths = sorted((ROOT / "conformance" / "scorecards").glob("*/scorecard.json"))
    assert {path.parent.name for path in paths} >= {*HONEST, "acme"}
    for path in paths:
        card = scorecard.read(path)
        assert card.manifest == manifest.frozen().sha256, f"{path}: run make conformance"
        assert card.complete and card.conforms["core"] is True and not card.failures
        assert path.with_suffix(".md").read_text() == scorecard.page(card)


def test_the_schema_is_written_down() -> None:
    path = ROOT / "conformance" / "scorecards" / "schema.json"
    assert path.read_bytes() == scorecard.schema()


def test_pages_follow_from_the_suite_and_the_scorecards() -> None:
    reference = ROOT / "docs" / "reference"
    assert (reference / pages.MATRIX).read_text() == pages.matrix(ROOT / "conformance" / "scorecards"), "make matrix"
    assert (reference / pages.CASES).read_text() == pages.cases(), "make matrix"


def test_every_kind_says_what_it_protects_from() -> None:
    assert all(len(case.kind.protects) > 20 for case in all_cases())


# -- what of a step-seam device a case exercises --------------------------------------------------------------


def outcome(case: str, *used: str) -> Outcome:
    return Outcome(case=case, verdict=Verdict.PASS, used=used)


def test_a_capability_that_only_factories_showed_is_not_tested_on_the_step_seam() -> None:
    outcomes = [
        outcome("attn.softcap.001", "softcap"),
        outcome("attn.alibi.001", "alibi"),
        outcome("e2e.greedy.002", "softcap"),
    ]
    states = {
        seam: {row.name: row.state for row in scorecard.capability_rows(outcomes, None, seam)}
        for seam in ("step", "torch")
    }
    assert states["step"] == {"softcap": "tested", "alibi": "reference"}
    assert states["torch"] == {"softcap": "tested", "alibi": "tested"}
    assert scorecard.passed_through(outcomes, "step") == {"program": 1, "factories": 2}
    assert scorecard.passed_through(outcomes, "torch") == {}
    assert "program: 1; through reference factories: 2" in scorecard.through_line({"program": 1, "factories": 2})


def test_a_capability_is_tested_by_cases_that_use_it() -> None:
    """Not by one that was refused after it had met the capability."""
    refused = Outcome(
        case="linear.quantized.001", verdict=Verdict.NOT_SUPPORTED, used=("dtype float16",), capability="x"
    )
    facts = Facts(
        evidence="host", hardware=[], versions={}, machine="", declared=["dtype float16"], undeclared=[], relaxations=[]
    )
    (row,) = [row for row in scorecard.capability_rows([refused], facts, "torch") if row.declared]
    assert (row.state, row.num_cases) == ("untested", 0)


@pytest.mark.parametrize("id", ["linear.undeclared.001", "attn.refused.002"])
def test_a_case_that_only_makes_a_kernel_uses_nothing(id: str) -> None:
    device, case = open_device("fake-faulty", {}), find_case(id)
    assert case is not None
    try:
        found = run_case(device, case)
    finally:
        device.close()
    assert (found.verdict, found.used) == (Verdict.PASS, ())


def test_every_section_of_the_core_profile_says_what_it_exercises() -> None:
    neither = {"isolation", "shape", "comm"}
    sections = {case.partition(".")[0] for case in manifest.frozen().cases}
    assert sections == scorecard.THROUGH_PROGRAM | scorecard.THROUGH_FACTORIES | neither


# -- what documents say of the suite --------------------------------------------------------------------------


def test_no_document_has_a_count_of_cases_or_faults_that_was_typed() -> None:
    generated = {"docs/reference/conformance-cases.md"}
    number = re.compile(r"\b\d+\s+(?:conformance\s+)?(?:cases|planted\s+faults)\b")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]:
        name = str(path.relative_to(ROOT))
        if name not in generated:
            assert number.findall(path.read_text()) == [], f"{name}: the suite grows; leave the number to make matrix"
    assert f"The {len(frozen().cases)} cases" in (ROOT / "docs" / "reference" / pages.CASES).read_text()


def test_the_page_of_the_step_seam_names_what_is_there() -> None:
    text = (ROOT / "docs" / "step-seam.md").read_text()
    for name, what in vars(StepProgram).items():
        shown = f"`{name}`" if isinstance(what, property) else f"{name}("
        assert name.startswith("_") or shown in text, f"StepProgram.{name} is not on the page"
    for name in ("config_json", "weights", "attention_specs", "build", "release", "ops"):
        assert hasattr(CheckpointSource, name) or name == "ops"
        assert f"`{name}" in text
    for section in scorecard.THROUGH_PROGRAM | scorecard.THROUGH_FACTORIES:
        assert f"`{section}`" in text, f"cases of {section} run the program or the factories: which?"
