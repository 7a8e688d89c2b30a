"""What transformers answers, once for each family, and verdicts on all requests of an engine against it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anychip import LLM
from anychip_conformance.equality.oracle import Answer, Verdict, greedy, judge
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import NUM_TOKENS, Case, generate, open_llm, prompts


class Oracles:
    """Checkpoints and their answers, made once per family and process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._answers: dict[str, list[Answer]] = {}

    def get(self, family: str) -> tuple[Path, list[Answer]]:
        folder = self._folder / family
        if family not in self._answers:
            model = make_checkpoint(family, folder)
            self._answers[family] = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts()]
        return folder, self._answers[family]


def as_expected(answers: Sequence[Answer], llm: LLM) -> list[Verdict]:
    """Runs the workload, and fails where a request diverges and nothing excuses that."""
    verdicts = [judge(answer, tokens) for answer, tokens in zip(answers, generate(llm), strict=True)]
    wrong = {i: v.divergence for i, v in enumerate(verdicts) if v.divergence is not None and not v.excused}
    assert not wrong, f"requests diverge, by index of the first different token: {wrong}"
    return verdicts


def check_engine(case: Case, oracles: Oracles, **settings: object) -> None:
    """The family's engine of these settings answers as expected, preempts where the case says so, and leaves no block
    taken."""
    checkpoint, answers = oracles.get(case.family)
    with open_llm(case, checkpoint, **settings) as llm:
        as_expected(answers, llm)
        scheduler = llm.engine.scheduler
        assert not case.preemption or scheduler.num_preemptions > 0, "the case was to force preemption"
        assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_usable
