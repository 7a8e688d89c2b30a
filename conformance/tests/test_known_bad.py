"""Plugins that are bad in a known way get the verdict that they deserve, and the run goes on to its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import packages
import pytest
from packages import make_bad

from anychip_conformance.scorecard import Scorecard
from anychip_conformance.session import Settings

SOURCES = Path(__file__).parent / "known_bad"


Judging = Callable[..., Scorecard]


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judging:
    """The scorecard of a bad plugin, by its name and cases."""

    def scorecard_of(name: str, *cases: str, **settings: Any) -> Scorecard:
        make_bad(tmp_path, name, (SOURCES / f"{name}.py").read_text())
        card, succeeded = packages.judged(Settings(device=name, cases=cases, **settings), monkeypatch, tmp_path)
        assert not succeeded
        return card

    return scorecard_of


def verdicts(card: Scorecard) -> dict[str, str]:
    return {failure.case: failure.verdict for failure in card.failures}


@pytest.mark.parametrize(("name", "said"), [("null", "error"), ("nan", "got nan"), ("skipping", "not today")])
def test_wrong_results_fail(judged: Judging, name: str, said: str) -> None:
    """Zeros, NaN, and a skip of the plugin's own: only the suite's gate may leave a case out."""
    card = judged(name, "attn.decode.001", "attn.mixed.001", "op.softcap.001")
    assert verdicts(card) == {"attn.decode.001": "fail", "attn.mixed.001": "fail"}
    assert all(said in failure.message for failure in card.failures)
    assert card.counts == {"core": {"fail": 2, "pass": 1}}


def test_who_refuses_everything_does_not_conform(judged: Judging) -> None:
    """No case fails, and whole sections have nothing to show."""
    card = judged("refusing", profile="quick")
    assert not card.failures
    assert card.counts["core"]["not_supported"] > 0 and card.counts["core"]["pass"] > 0
    states = {row.name: row.state for row in card.capabilities}
    assert states["kv dtype float16"] == "refused"


def test_a_declared_capability_that_does_not_work_is_a_failure(judged: Judging) -> None:
    card = judged("overclaiming", "attn.alibi.001", "attn.kv_quantized.001", "attn.decode.001")
    assert verdicts(card) == {"attn.alibi.001": "fail", "attn.kv_quantized.001": "fail"}
    states = {row.name: row.state for row in card.capabilities}
    assert states["alibi"] == "failed" and states["kv dtype float8_e4m3fn"] == "failed"


def test_a_crash_is_a_verdict(judged: Judging) -> None:
    card = judged("crashing", "attn.decode.001", "attn.decode.002", "op.softcap.001")
    assert verdicts(card) == {"attn.decode.001": "crash", "attn.decode.002": "crash"}
    assert "SIGABRT" in card.failures[0].message
    assert card.counts["core"]["pass"] == 1


def test_a_hang_is_a_verdict(judged: Judging) -> None:
    card = judged("hanging", "linear.dense.001", "op.softcap.001", deadline_scale=0.2)
    assert verdicts(card) == {"linear.dense.001": "crash"}
    assert "no answer within 12 s" in card.failures[0].message
    assert card.counts["core"]["pass"] == 1


def test_computing_on_the_host_in_silence_fails(judged: Judging) -> None:
    card = judged("fallback", "isolation.device.001", "op.softcap.001")
    assert verdicts(card) == {"isolation.device.001": "fail"}
    assert "computes on torch's cpu" in card.failures[0].message


def test_patching_fails(judged: Judging) -> None:
    card = judged("patching", "isolation.patches.001")
    message = card.failures[0].message
    assert "anychip.ops.reference.functional.rms_norm" in message and "torch.nn.functional.softmax" in message
