"""What transformers answers, once for each family, and verdicts on all requests of an engine against it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anychip import LLM
from anychip_conformance.equality.oracle import Answer, Verdict, greedy, judge
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import NUM_TOKENS, generate, prompts


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
