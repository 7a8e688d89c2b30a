"""The equality workload: sixteen ragged requests at once, under every way the engine can be run."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from anychip import LLM, SamplingParams
from anychip.scheduler.scheduler import ScheduledStep, Scheduler
from anychip_conformance.equality import VOCAB_SIZE
from anychip_conformance.equality.tiny_models import FAMILIES, THROUGH_TRANSFORMERS

NUM_TOKENS = 12
_STEPS_BETWEEN_PREEMPTIONS = 5
_FORCED_PREEMPTIONS = 20
MAX_MODEL_LEN = 160
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 48, 64, 65, 100, 120, 125, 127)
"""Around the block sizes 16 and 128, and the window of 32."""

DEVICES: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "cpu-tp2": {"device": "cpu", "tensor_parallel_size": 2},
    "fake-static": {"device": "fake-static"},
    "fake-hostlen": {"device": "fake-hostlen"},
    "fake-spmd": {"device": "fake-spmd"},
}


@dataclass(frozen=True, slots=True)
class Case:
    family: str
    budget: int
    prefix_caching: bool
    preemption: bool
    overlap: bool
    device: str

    def __str__(self) -> str:
        flags = [
            "prefix" if self.prefix_caching else "noprefix",
            "preempt" if self.preemption else "roomy",
            "overlap" if self.overlap else "inorder",
        ]
        return "-".join([self.device, self.family, str(self.budget), *flags])


_STATES = (
    "mamba2",
    "mamba",
    "qwen3-next",
    "falcon-h1",
    "bamba",
    "granite-hybrid",
    "jamba",
    "nemotron-h",
    "lfm2",
    "minimax",
    "qwen3.5",
    "qwen3.5-moe",
    "granite-hybrid-moe",
    "kimi-linear",
    "lfm2-moe",
    "zamba2",
    "nemotron-h-moe",
)
CANNOT = {
    **{(family, "fake-hostlen"): "it has no recurrences" for family in _STATES},
    **{
        (family, "fake-spmd"): "two key heads of state layers over four devices"
        for family in ("qwen3-next", "qwen3.5", "qwen3.5-moe")
    },
    **{
        ("nemotron-h-moe", device): "its experts have no gate"
        for device in ("fake-static", "fake-hostlen", "fake-spmd")
    },
    ("stablelm", "cpu-tp2"): "transformers has no tensor-parallel plan for it",
    ("stablelm", "fake-spmd"): "transformers has no tensor-parallel plan for it",
    **{
        (family, "fake-hostlen"): "it stands for devices without latent attention, and refuses it by name"
        for family in ("deepseek-v2", "deepseek-v3", "deepseek-v32", "glm-5", "glm4-moe-lite")
    },
    ("phi", "fake-spmd"): "two key-value heads over four devices, whose replication is not in transformers' plan",
}
"""Families and devices that are refused together, and why."""

_TWO_GROUPS = ("gemma2", "gemma3", "gpt-oss", "qwen2", "qwen2-moe", "dots1")
"""Families whose layers differ in their attention, so that a request holds blocks of two groups."""

_VALUES: tuple[Sequence[Any], ...] = (
    (*FAMILIES, *THROUGH_TRANSFORMERS),
    (7, 64, 4096),
    (True, False),
    (True, False),
    (True, False),
    tuple(DEVICES),
)


_MET_BY_A_FAMILY = {1: 2, 5: 2}
"""Of the budgets and of the devices, by place in _VALUES, how many a family meets in the covering array. With two cases
a family the array stays small enough for every run of the tests, and the others are met by other families."""


_SLOW, _INSTEAD = "cpu-tp2", "fake-spmd"
"""An engine of two processes starts for seven seconds, and four ranks of one process divide a model as well."""


def full_product() -> list[Case]:
    cases = [Case(*values) for values in itertools.product(*_VALUES)]
    return [case for case in cases if (case.family, case.device) not in CANNOT]


SELDOM = (
    "qwen3.5-moe",
    "granite-hybrid-moe",
    "lfm2-moe",
    "glm4-moe-lite",
    "dots1",
    "ernie4.5",
    "seed-oss",
    "nemotron-h-moe",
)
"""Families that are parts of others, put together anew: the full product has them, and the covering array has not."""


def covering() -> list[Case]:
    """A covering array: every pair of two settings' values stands together in some case, but that each family meets
    two of the budgets and two of the devices."""
    return cover([case for case in full_product() if case.family not in SELDOM], pairs)


Covered = TypeVar("Covered")


def cover(cases: Sequence[Covered], pairs_of: Callable[[Covered], set[Any]]) -> list[Covered]:
    """Cases that hold every pair that some case holds. Greedy, and always the same."""
    held = [(case, pairs_of(case)) for case in cases]
    missing = set[Any]().union(*(pairs for _, pairs in held))
    chosen = []
    while missing:
        best, covered = max(held, key=lambda each: len(missing & each[1]))
        chosen.append(best)
        missing -= covered
    return chosen


def pairs(case: Case) -> set[tuple[int, Any, int, Any]]:
    """The pairs of values that a covering array has of a case."""
    values = (case.family, case.budget, case.prefix_caching, case.preemption, case.overlap, case.device)
    found = {(i, values[i], j, values[j]) for i, j in itertools.combinations(range(len(values)), 2)}
    for place in _MET_BY_A_FAMILY:
        if values[place] not in met_by(case.family, place):
            found.remove((0, case.family, place, values[place]))
    return found


def met_by(family: str, place: int) -> list[Any]:
    """Of the budgets or the devices, those that a family meets: others than the family before it."""
    there = [value for value in _VALUES[place] if (family, value) not in CANNOT]
    if _SLOW in there and _INSTEAD in there:
        there.remove(_SLOW)
    index = list(_VALUES[0]).index(family)
    return [value for nth, value in enumerate(there) if (index + nth) % len(there) < _MET_BY_A_FAMILY[place]]


def prompts() -> list[list[int]]:
    """Half of them are beginnings of one text, so that a prefix cache has something to share."""
    rng = random.Random(0)
    shared = [rng.randrange(3, VOCAB_SIZE) for _ in range(max(LENGTHS))]
    return [
        shared[:length] if index % 2 else [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]
        for index, length in enumerate(LENGTHS)
    ]


def open_llm(case: Case, checkpoint: Path, **settings: Any) -> LLM:
    """The engine as the case wants it; `settings` add to that or replace it. Preemption is forced: by a KV cache that
    holds a few requests only, and by taking the youngest request's blocks every few steps, whatever is in flight for
    it."""
    block_size = 128 if case.device == "fake-hostlen" else 16
    groups = 2 if case.family in _TWO_GROUPS else 1
    longest = groups * -(-MAX_MODEL_LEN // block_size)
    blocks = longest + groups * (2 if block_size == 128 else 4) if case.preemption else 16 * longest
    given: dict[str, Any] = {
        "skip_tokenizer": True,
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 16,
        "max_num_batched_tokens": case.budget,
        "num_kv_blocks": 1 + blocks,
        "block_size": block_size,
        "prefix_caching": case.prefix_caching,
        "overlap": case.overlap,
        **DEVICES[case.device],
        **settings,
    }
    llm = LLM(str(checkpoint), **given)
    if case.preemption:
        _preempt_often(llm.engine.scheduler)
    return llm


def num_compilations(llm: LLM) -> int | None:
    """What a compiling step program counts; None for others."""
    worker = getattr(llm.engine.executor, "worker", None)
    return getattr(worker.program, "num_compilations", None) if worker is not None else None


def _preempt_often(scheduler: Scheduler) -> None:
    schedule, calls = scheduler.schedule, itertools.count(1)
    last = _FORCED_PREEMPTIONS * _STEPS_BETWEEN_PREEMPTIONS  # or a long prompt in short chunks would never end

    def schedule_after_preemption() -> ScheduledStep | None:
        call = next(calls)
        if call <= last and call % _STEPS_BETWEEN_PREEMPTIONS == 0 and scheduler.running:
            scheduler.preempt(scheduler.running[-1])
        return schedule()

    scheduler.schedule = schedule_after_preemption  # type: ignore[method-assign]


def generate(llm: LLM) -> Iterator[list[int]]:
    """Greedy tokens of every request, in order."""
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for output in llm.generate(prompts(), sampling):
        yield output.outputs[0].token_ids
