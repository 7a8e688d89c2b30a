"""The judged process: opens the device once and runs the cases that it is told to, one answer a line.

The judge reads answers from a descriptor of their own, so a plugin may print what it likes.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from pathlib import Path

import msgspec
from hypothesis.configuration import set_hypothesis_home_dir

from anychip_conformance.device import Device, absent_device, open_device
from anychip_conformance.facts import Facts, gather_facts
from anychip_conformance.registry import find_case
from anychip_conformance.run import described, run_case
from anychip_conformance.verdicts import Outcome, Verdict


class Opening(msgspec.Struct, frozen=True, kw_only=True):
    """The first line to the process."""

    device: str
    options: dict[str, str]


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """Every other line. `params` is JSON."""

    case: str
    seed: int | None = None
    params: str | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """`facts` answers the opening; `fatal`: the device could not be opened, and only cases that
    need none can be asked."""

    outcome: Outcome | None = None
    facts: Facts | None = None
    fatal: str = ""


def main(answers_fd: int) -> None:
    with os.fdopen(answers_fd, "wb", buffering=0) as answers, os.fdopen(os.dup(0), "rb") as tasks:
        os.dup2(2, 1)  # what plugins print goes where their errors go
        # Beside the caller's own files nothing of ours should lie.
        set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "anychip-hypothesis")
        opening = msgspec.json.decode(tasks.readline(), type=Opening)
        try:
            device = open_device(opening.device, opening.options)
            _send(answers, Answer(facts=gather_facts(device)))
        except Exception as error:  # noqa: BLE001 - a plugin may raise anything
            _send(answers, Answer(fatal=described(error)))
            device = absent_device(opening.device, opening.options)
        gc.freeze()  # every engine that closes collects garbage, and need not look for it in the libraries
        serve(device, tasks, answers)
        device.close()


def serve(device: Device, tasks: object, answers: object) -> None:
    for line in tasks:  # type: ignore[attr-defined]
        task = msgspec.json.decode(line, type=Task)
        case = find_case(task.case)
        if case is None:
            outcome = Outcome(case=task.case, verdict=Verdict.FAIL, message="no such case")
        else:
            params = None if task.params is None else task.params.encode()
            outcome = run_case(device, case, seed=task.seed, params=params)
        _send(answers, Answer(outcome=outcome))


def _send(answers: object, answer: Answer) -> None:
    answers.write(msgspec.json.encode(answer) + b"\n")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(int(sys.argv[1]))
