"""`anychip diff-numerics` finds the layer that differs, and says nothing where none does."""

from __future__ import annotations

import json

import pytest
from packages import anychip

TOKENS = ["--tokens", "1,40,300,7,9,250,11,12,13,14,15,16,17,18,19,20,21"]


@pytest.mark.parametrize("device", ["fake-static", "fake-hostlen"])
def test_honest_devices_differ_within_the_bound(device: str) -> None:
    done = anychip(["diff-numerics", "--device", device, "--against", "cpu", *TOKENS, "--json"])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["first_beyond"] is None
    assert [row["name"] for row in found["layers"]][-2:] == ["layer 7", "logits"]
    assert all(0 <= row["gathered"] < row["bound"] for row in found["layers"])


def test_a_wrong_op_shows_in_the_layer_that_has_it() -> None:
    fault = ["--device", "fake-faulty", "--device-opt", "fault=op-rotary-styles-swapped"]
    done = anychip(["diff-numerics", *fault, "--against", "cpu", *TOKENS])
    assert done.returncode == 1
    assert "first beyond its bound: layer 0" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "nothing"], "'nothing' is not installed"),
        (["--device", "fake-static", "--tokens", "1,x"], "write ids such as"),
        (["--device", "fake-static", "--tokens", "99999999"], "the model's vocabulary"),
    ],
)
def test_what_cannot_be_compared_is_said(arguments: list[str], said: str) -> None:
    done = anychip(["diff-numerics", "--against", "cpu", *arguments])
    assert done.returncode == 2
    assert said in done.stderr
