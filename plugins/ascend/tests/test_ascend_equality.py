"""Greedy tokens equal transformers' over the simulated NPU: every native family, graphs or none, one rank or two."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from anychip_conformance.engines import Checkpoint

NUM_TOKENS = 8
LENGTHS = (1, 7, 33, 100, 127)
MAX_EXCUSED = 3
"""Of the requests of one case, in a dtype of two bytes: of two logits that its rounding may swap, one is as good."""

KINDS = {"float16": "fused", "bfloat16": "fused", "float32": "plain"}
"""Dtypes, and the attention that serves them: the vendor's op has no float32."""

GRAPHS, RANKS = ("full", "pieces", "off"), (1, 2)
ALONE = ("stablelm",)
"""Families for which transformers has no tensor-parallel plan."""


@dataclass(frozen=True)
class Case:
    family: str
    dtype: str
    graphs: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.family}-{self.dtype}-{self.graphs}-tp{self.ranks}"


CASES = [
    Case("llama", "float16", "full", 2),
    Case("qwen3", "float16", "pieces", 1),
    Case("phi", "bfloat16", "full", 1),
    Case("gemma2", "bfloat16", "pieces", 2),
    Case("gemma3", "float32", "off", 1),
    Case("mistral", "float16", "off", 2),
    Case("mixtral", "float32", "full", 2),
    Case("qwen2", "bfloat16", "off", 1),
    Case("phi3", "float32", "pieces", 1),
    Case("granite", "float16", "full", 1),
    Case("gpt-oss", "float16", "pieces", 2),
    Case("gpt-neox", "float16", "full", 1),
    Case("olmo2", "bfloat16", "full", 2),
    Case("stablelm", "float16", "full", 1),
    Case("qwen3-moe", "bfloat16", "full", 1),
]
"""A covering array: each family, and every two of dtype, graphs and ranks."""


def test_the_cases_cover_every_two_settings():
    for values, names in (
        (itertools.product(KINDS, GRAPHS), ("dtype", "graphs")),
        (itertools.product(KINDS, RANKS), ("dtype", "ranks")),
        (itertools.product(GRAPHS, RANKS), ("graphs", "ranks")),
    ):
        assert set(values) == {tuple(getattr(case, name) for name in names) for case in CASES}


def product() -> list[Case]:
    every = itertools.product([case.family for case in CASES], KINDS, GRAPHS, RANKS)
    return [case for case in itertools.starmap(Case, every) if case.ranks == 1 or case.family not in ALONE]


class Oracle:
    """What transformers answers of a family's weights in a dtype, in float32, and where two answers are as good."""

    def __init__(self, family: str) -> None:
        from anychip_npu_simulator.install import install

        install()  # before transformers, which imports torch_npu
        from anychip_conformance.engines import Checkpoint

        self.checkpoint: Checkpoint = Checkpoint(family, head_dim=16)

    def judge(self, prompt: list[int], tokens: list[int], dtype: str) -> str:
        """ "": equal. "excused": the first difference is between logits that rounding may swap. Otherwise, what is
        wrong."""
        ids = list(prompt)
        for index, token in enumerate(tokens):
            logits = self.checkpoint.logits(ids, dtype)
            best = int(logits.argmax())
            if best != token:
                gap = float(logits[best] - logits[token])
                bound = 4 * self.checkpoint.spread(ids, dtype) if dtype != "float32" else 1e-4
                return (
                    "excused"
                    if gap <= bound
                    else f"token {index} is {token}, not {best}: {gap:.2g} apart, {bound:.2g} allowed"
                )
            ids.append(token)
        return ""


@pytest.fixture(scope="module")
def oracles() -> Iterator[dict[str, Oracle]]:
    made: dict[str, Oracle] = {}
    yield made
    for oracle in made.values():
        oracle.checkpoint.close()


def check(case: Case, oracles: dict[str, Oracle], monkeypatch: pytest.MonkeyPatch) -> None:
    if case.family not in oracles:
        oracles[case.family] = Oracle(case.family)
    oracle = oracles[case.family]
    from anychip import LLM, SamplingParams

    monkeypatch.setenv("NPU_SIMULATOR_DEVICES", "2")
    prompts = [[3 + (17 * i + 31 * n) % 500 for i in range(n)] for n in LENGTHS]
    options = {"graphs": case.graphs, "attention": KINDS[case.dtype]}
    with LLM(
        str(oracle.checkpoint.path), skip_tokenizer=True, dtype=case.dtype, device="ascend-simulated",
        device_options=options, tensor_parallel_size=case.ranks, max_model_len=160, max_num_seqs=8,
        max_num_batched_tokens=64, num_kv_blocks=40,
    ) as llm:  # fmt: skip
        sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        answers = [output.outputs[0].token_ids for output in llm.generate(prompts, sampling)]
    verdicts = [oracle.judge(prompt, tokens, case.dtype) for prompt, tokens in zip(prompts, answers, strict=True)]
    assert not [verdict for verdict in verdicts if verdict not in ("", "excused")]
    assert verdicts.count("excused") <= (0 if case.dtype == "float32" else MAX_EXCUSED)


@pytest.mark.simulated
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_greedy_tokens_equal_transformers(case, oracles, monkeypatch):
    check(case, oracles, monkeypatch)


@pytest.mark.full
@pytest.mark.simulated
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", product(), ids=str)
def test_greedy_tokens_equal_transformers_in_the_full_product(case, oracles, monkeypatch):
    check(case, oracles, monkeypatch)
