"""Whatever is drafted, by whom and on what device: every request gets the tokens that it gets without drafts.

The engine is run in the ways of the equality workload, with a proposer beside them; sixteen requests at once ask for
tokens in every way there is. In bfloat16, near-ties are excused as the equality tests excuse them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from heads_kit import write_eagle1, write_eagle3, write_medusa
from hostile_proposers import HOSTILE, LATE_S, MISBEHAVING, found_by_name  # noqa: F401 - a fixture
from mtp_kit import write_mtp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from anychip import SamplingParams
from anychip.drafts import Drafts
from anychip.engine.outputs import RequestOutput
from anychip.engine_stats import SpeculationStats
from anychip.sampling_params import StructuredOutput
from anychip.scheduler.step import StepDraft
from anychip.speculation import guard
from anychip_conformance.drafts import Answers
from anychip_conformance.engines import Checkpoint, bound_in
from anychip_conformance.equality import NUM_LAYERS
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import (
    Case,
    cover,
    full_product,
    num_compilations,
    open_llm,
    pairs,
    prompts,
)

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "qwen3-moe", "gpt-oss")
"""Plain attention, windows, softcaps, sinks, experts."""

DRAFT_MODELS = ("itself", "another")
"""The target's own checkpoint, and one of another family with the same tokenizer: nearly always right, and wrong."""
HEADS = {"eagle3": write_eagle3, "eagle1": write_eagle1, "medusa": lambda folder: write_medusa(folder, num_heads=8)}
"""Of random weights: nearly always wrong."""
OWN_HEAD = "mtp"
WITH_OWN_HEADS = ("glm4-moe", "deepseek-v3")
"""Families whose checkpoints have a head."""
TWO_PROGRAMS = ("cpu", "cpu-tp2", "fake-hostlen")
"""Devices of the torch seam, which run a draft model or a head."""
PROPOSERS = ("ngram", "suffix", "auto", *HOSTILE, *DRAFT_MODELS, *HEADS)
MAX_DRAFTS = 5
ROUNDS = 2
"""The second finds the first one's prompts in the prefix cache, and its answers among what was said before."""

FIRST_BYTE = 3
A, B = FIRST_BYTE + ord("a"), FIRST_BYTE + ord("b")
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 3}},
        "required": ["name"],
        "additionalProperties": False,
    }
)


def asked(**settings: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 24, "ignore_eos": True, **settings})


ASKED = [
    asked(),
    asked(temperature=1.0, seed=1),
    asked(temperature=1.0, seed=2, n=3, top_p=0.9, max_tokens=12),
    asked(temperature=0.8, seed=3, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5),
    asked(temperature=0.9, seed=4, logit_bias={A: 8.0, B: 8.0}, stop=("baa", "bbb")),
    asked(temperature=0.7, seed=5, logprobs=2, min_tokens=6, stop_token_ids=tuple(range(3, 200)), ignore_eos=False),
    asked(structured=StructuredOutput("json_schema", SCHEMA), max_tokens=32, ignore_eos=False),
    asked(temperature=1.0, seed=6, structured=StructuredOutput("regex", "(yes|no|maybe), (yes|no)"), ignore_eos=False),
    asked(logit_bias={A: 30.0, B: 30.0}, bad_words=("aa", "bab")),
    asked(beam_width=2, n=2, max_tokens=8),
    asked(temperature=1.5, seed=7, top_k=4, allowed_token_ids=tuple(range(20, 60))),
    asked(repetition_penalty=1.5, frequency_penalty=1.0, logprobs=0),
    asked(temperature=1.0, seed=8, min_p=0.3),
    asked(n=2, temperature=0.5, seed=9, structured=StructuredOutput("regex", "[ab]{8,20}"), ignore_eos=False),
    asked(prompt_logprobs=1, max_tokens=10),
    asked(temperature=1.0, seed=10, max_tokens=1),
]
"""One for each of the workload's prompts."""


@dataclass(frozen=True, slots=True)
class DraftedCase:
    case: Case
    proposer: str

    def __str__(self) -> str:
        return f"{self.proposer}-{self.case}"


def drafted_product() -> list[DraftedCase]:
    cases = full_product()
    drafted = [DraftedCase(case, proposer) for case in cases if case.family in FAMILIES for proposer in PROPOSERS]
    drafted += [DraftedCase(case, OWN_HEAD) for case in cases if case.family in WITH_OWN_HEADS]
    on_the_device = (*DRAFT_MODELS, *HEADS, OWN_HEAD)
    return [each for each in drafted if each.proposer not in on_the_device or each.case.device in TWO_PROGRAMS]


def drafted_pairs(drafted: DraftedCase) -> set[Any]:
    """The case's own, and the proposer with each of the case's values."""
    case = drafted.case
    values = (case.family, case.budget, case.prefix_caching, case.preemption, case.overlap, case.device)
    return pairs(case) | {(drafted.proposer, place, value) for place, value in enumerate(values)}


def one_of_everything(family: str, device: str) -> Case:
    return Case(family, budget=64, prefix_caching=True, preemption=False, overlap=True, device=device)


def write_byte_tokenizer(folder: Path) -> None:
    """A token a byte, behind the special ones: tiny checkpoints have no text of their own."""
    alphabet = {name: FIRST_BYTE + byte for byte, name in byte_names().items()}
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "<pad>": 2, **alphabet}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def byte_names() -> dict[int, str]:
    """By byte, the character that stands for it in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + at) for at, byte in enumerate(others)}


def said(outputs: list[RequestOutput]) -> list[Any]:
    return [
        (one.token_ids, one.text, one.finish_reason, [entry.top_ids for entry in one.logprobs or ()])
        for output in outputs
        for one in output.outputs
    ]


class Workplace:
    """Checkpoints by family, and by family and device what is said without drafts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._said: dict[tuple[str, str], list[list[RequestOutput]]] = {}

    def checkpoint(self, family: str) -> Path:
        folder = self._folder / family
        if not folder.exists():
            (write_mtp if family in WITH_OWN_HEADS else make_checkpoint)(family, folder)
            write_byte_tokenizer(folder)
        return folder

    def speculate(self, drafted: DraftedCase) -> str:
        """The setting."""
        family, head = drafted.case.family, self._folder / drafted.proposer
        if drafted.proposer in HEADS:
            if not head.exists():
                HEADS[drafted.proposer](head)
            return f"{'medusa' if drafted.proposer == 'medusa' else 'eagle'}:{head}"
        if drafted.proposer not in DRAFT_MODELS:
            return drafted.proposer
        if drafted.proposer == "another":
            family = "qwen3" if family == "llama" else "llama"
        return f"draft:{self.checkpoint(family)}"

    def without(self, family: str, device: str) -> list[list[RequestOutput]]:
        key = (family, device)
        if key not in self._said:
            with open_llm(one_of_everything(*key), self.checkpoint(family), skip_tokenizer=False) as llm:
                self._said[key] = [llm.generate(prompts(), ASKED) for _ in range(ROUNDS)]
        return self._said[key]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """The late proposer is later than the engine waits."""
    if "late" in request.node.name:
        monkeypatch.setattr(guard, "_LIMIT_S", LATE_S / 2)
    yield
    Answers.texts = ()


def check(drafted: DraftedCase, workplace: Workplace) -> SpeculationStats:
    case = drafted.case
    expected = workplace.without(case.family, case.device)
    Answers.texts = [[*output.prompt_token_ids, *one.token_ids] for output in expected[0] for one in output.outputs]
    settings = {"skip_tokenizer": False, "speculate": workplace.speculate(drafted), "max_drafts": MAX_DRAFTS}
    with open_llm(case, workplace.checkpoint(case.family), **settings) as llm:
        compiled = num_compilations(llm)
        scheduler = llm.engine.scheduler
        scheduler.drafting.measured_costs_are_ignored()
        for wanted in expected:
            assert said(llm.generate(prompts(), ASKED)) == said(wanted)
        assert num_compilations(llm) == compiled, "a compiled platform compiles nothing after warm-up"
        llm.engine.drain()
        assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_usable
        assert (scheduler.num_preemptions > 0) >= case.preemption, "the case was to force preemption"
        stats = scheduler.stats.speculation
    # The engine may have given up on the late one before a draft had room; and in steps of seven tokens sixteen rows
    # leave a draft model none to catch up with.
    may_be_none = drafted.proposer == "late" or (drafted.proposer in DRAFT_MODELS and case.budget < len(prompts()))
    assert stats.drafted > 0 or may_be_none, "nothing was drafted"
    assert (stats.failures > 0) == (drafted.proposer in MISBEHAVING), stats
    return stats


@pytest.mark.full
@pytest.mark.parametrize("drafted", cover(drafted_product(), drafted_pairs), ids=str)
def test_every_request_gets_the_tokens_that_it_gets_without_drafts(drafted, workplace):
    check(drafted, workplace)


@pytest.mark.parametrize("proposer", ["right", "raising", "another", "eagle3", OWN_HEAD])
def test_requests_of_every_kind_get_the_tokens_that_they_get_without_drafts(proposer, workplace):
    family = WITH_OWN_HEADS[0] if proposer == OWN_HEAD else "llama"
    case = Case(family, budget=64, prefix_caching=True, preemption=True, overlap=True, device="cpu")
    check(DraftedCase(case, proposer), workplace)


@pytest.mark.full
def test_a_compiled_platform_compiles_nothing_for_drafts_of_any_length(workplace, monkeypatch):
    """Each length from none to the most that there may be, beside prompts, masks, edits and log-probabilities."""
    lengths = set()
    place_drafts = StepDraft.place_drafts

    def watched(step: StepDraft, rows: Sequence[int], drafts: Drafts, counts: np.ndarray) -> None:
        lengths.update(counts[counts > 0].tolist())
        place_drafts(step, rows, drafts, counts)

    monkeypatch.setattr(StepDraft, "place_drafts", watched)
    check(DraftedCase(one_of_everything("llama", "fake-static"), "lengths"), workplace)
    assert lengths == set(range(1, MAX_DRAFTS + 1))


@pytest.mark.full
@pytest.mark.parametrize("proposer", ["lengths", "random", "eagle1", "eagle3"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_tokens_in_bfloat16_differ_at_near_ties_alone(family, proposer, tmp_path):
    """Families with experts are left out: in a narrow dtype a router may honestly pick others."""
    speculate = proposer
    if proposer in HEADS:
        HEADS[proposer](tmp_path)
        speculate = f"eagle:{tmp_path}"
    check_near_ties(Checkpoint(family, head_dim=16), family, speculate)


@pytest.mark.full
def test_tokens_in_bfloat16_beside_the_models_own_head_differ_at_near_ties_alone():
    """Its layer has experts, and the model's have none."""
    family = WITH_OWN_HEADS[0]
    model = Checkpoint(family, head_dim=16)
    model.model = write_mtp(family, model.path, head_dim=16, first_k_dense_replace=NUM_LAYERS).target
    check_near_ties(model, family, OWN_HEAD)


def check_near_ties(model: Checkpoint, family: str, speculate: str) -> None:
    """Greedy, up to the first difference, where the two tokens must be closer than two evaluations may lie apart."""
    case, found = one_of_everything(family, "cpu"), []
    for settings in ({}, {"speculate": speculate, "max_drafts": MAX_DRAFTS}):
        with open_llm(case, model.path, dtype="bfloat16", **settings) as llm:
            if (drafting := llm.engine.scheduler.drafting) is not None:
                drafting.measured_costs_are_ignored()
            found.append([output.outputs[0].token_ids for output in llm.generate(prompts(), asked())])
        Answers.texts = [[*prompt, *tokens] for prompt, tokens in zip(prompts(), found[0], strict=True)]
    assert drafting is not None and drafting.stats.drafted > 0
    for prompt, without, drafted in zip(prompts(), *found, strict=True):
        place = next((at for at, pair in enumerate(zip(without, drafted, strict=True)) if len({*pair}) > 1), None)
        if place is not None:
            ids = [*prompt, *without[:place]]
            logits, bound = model.logits(ids, "bfloat16"), 2 * bound_in("bfloat16", model, ids)
            assert abs(logits[without[place]] - logits[drafted[place]]) < bound, f"{len(prompt)} tokens, then {place}"
    model.close()
