"""The step program on torch_xla's CPU devices, in an environment of its own: `make tpu-test`. As many devices as
CPU_NUM_DEVICES says drive one model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("torch_xla", reason="torch_xla is not installed: make tpu-venv")
if os.environ.get("PJRT_DEVICE") != "CPU":
    pytest.skip("PJRT_DEVICE is not CPU: make tpu-test", allow_module_level=True)

from anychip_conformance.equality import workload
from anychip_conformance.equality.oracle import Answer, greedy, judge
from anychip_conformance.equality.tiny_models import FAMILIES, THROUGH_TRANSFORMERS, make_checkpoint

DEVICES = int(os.environ.get("CPU_NUM_DEVICES", "1"))
ALWAYS = ("llama", "gemma3", "gpt-oss", "qwen3-moe")
REFUSED = {family for family, device in workload.CANNOT if device == "fake-spmd"} if DEVICES > 1 else set()
workload.DEVICES["tpu"] = {"device": "tpu"}


def cases() -> list[object]:
    """A family each, the other settings in turn, so that all of them are met."""
    settings = [(7, True, False, True), (64, False, True, True), (4096, True, True, False), (64, True, False, False)]
    found = []
    for index, family in enumerate([*FAMILIES, *THROUGH_TRANSFORMERS]):
        if family not in REFUSED:
            case = workload.Case(family, *settings[index % len(settings)], "tpu")
            found.append(pytest.param(case, id=str(case), marks=() if family in ALWAYS else pytest.mark.full))
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", cases())
def test_greedy_tokens_equal_transformers(case: workload.Case, tmp_path: Path) -> None:
    model = make_checkpoint(case.family, tmp_path)
    answers: list[Answer] = [greedy(model, prompt, workload.NUM_TOKENS) for prompt in workload.prompts()]
    with workload.open_llm(case, tmp_path) as llm:
        runtime = llm.engine.executor.worker.platform.runtime
        compiled = runtime.num_compilations
        assert runtime.num_devices == DEVICES
        tokens = list(workload.generate(llm))
        assert runtime.num_compilations == compiled, "nothing is compiled after warm-up"
    wrong = {i: judged.divergence for i, judged in enumerate(map(judge, answers, tokens)) if not judged.excused}
    assert not {i: at for i, at in wrong.items() if at is not None}
