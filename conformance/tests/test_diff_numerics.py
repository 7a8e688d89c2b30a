"""`anychip diff-numerics` finds the layer that differs, and says nothing where none does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from packages import anychip

from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.program_errors import program_errors

TOKENS = ["--tokens", "1,40,300,7,9,250,11,12,13,14,15,16,17,18,19,20,21"]


@pytest.mark.parametrize(
    ("device", "last"),
    [
        ("fake-static", ["logits of the prompt", "logits token by token"]),
        ("fake-hostlen", ["layer 7", "logits"]),
    ],
)
def test_honest_devices_differ_within_the_bound(device: str, last: list[str]) -> None:
    done = anychip(["diff-numerics", "--device", device, "--against", "cpu", *TOKENS, "--json"])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["first_beyond"] is None
    assert [row["name"] for row in found["layers"]][-2:] == last
    assert all(0 < row["gathered"] < row["bound"] for row in found["layers"])


@pytest.mark.full
def test_a_fault_in_a_step_program_shows_and_its_layer_is_found(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    fault = ["--device", "fake-faulty-step", "--device-opt", "fault=step-attention-scale"]
    done = anychip(["diff-numerics", str(tmp_path), *fault, "--against", "cpu", *TOKENS, "--json"])
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["first_beyond"] == "layer 1"
    beyond = {row["name"]: not row["gathered"] <= row["bound"] for row in found["layers"]}
    assert beyond["layer 1"] and not beyond["layer 0"]
    assert beyond["logits of the prompt"] and beyond["logits token by token"]


def test_programs_are_compared_by_the_tokens_that_both_scored() -> None:
    ids = torch.tensor([[1, 2], [3, 0]])
    ours = torch.tensor([[-1.0, -0.5], [-2.0, -0.1]])
    program = {f"{how}.{part}": value for how in ("whole", "single") for part, value in
               (("ids", ids), ("logprobs", ours))}  # fmt: skip
    assert program_errors(program, program) == {"whole": 0.0, "single": 0.0}
    other = {**program, "single.logprobs": ours + torch.tensor([[0.5, 9.0], [0.5, 9.0]])}
    found = program_errors(other, program)
    assert found["whole"] == 0.0 and found["single"] == pytest.approx(0.5 / 2.5**0.5)
    logits = torch.zeros(3, 4)
    exact = logits.double().log_softmax(-1)[:2].gather(1, ids)
    whole = {"whole.ids": ids, "whole.logprobs": exact, "single.ids": ids[1:], "single.logprobs": exact[1:] + 1}
    assert program_errors(whole, {"logits": logits + 2.0}) == {"whole": 0.0, "single": 0.5}


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
