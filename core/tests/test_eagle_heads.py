"""Heads draft what their loop in plain torch says of the same text, however the engine is run; texts stay the target's.

One page may differ from that loop: a block's last one, where texts that share the block go on with different tokens
(docs/decisions/0051). No texts here do; those of test_speculated_product.py do.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from heads_kit import PlainHead, write_eagle1, write_eagle3
from transformers import AutoModelForCausalLM

from anychip import SamplingParams
from anychip.scheduler.proposing import Proposing
from anychip.speculation.speculator import Speculator
from anychip_conformance.equality import VOCAB_SIZE
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import Case, open_llm

MAX_DRAFTS = 3
LAYERS = (0, 1, 2)
"""Not the last: transformers shows its hidden states behind the final norm."""
WRITERS: dict[str, Callable[..., Any]] = {
    "eagle3": lambda folder: write_eagle3(folder, layers=LAYERS),
    "eagle3-own-embedding": lambda folder: write_eagle3(folder, layers=LAYERS, own_embedding=True),
    "eagle1": write_eagle1,
    "eagle1-two-layers": lambda folder: write_eagle1(folder, num_layers=2, bias=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def checkpoint(folder: Path, family: str) -> Path:
    if not (folder / family).exists():
        make_checkpoint(family, folder / family)
    return folder / family


def texts() -> list[list[int]]:
    """Some share a beginning, and part within a block."""
    rng = random.Random(1)

    def some(count: int) -> list[int]:
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(count)]

    shared = some(60)
    return [some(1), some(2), shared[:21] + some(9), shared[:39] + some(4), shared[:39] + some(30), some(48)]


class Reference:
    """The target in transformers' code, and the head in plain torch."""

    def __init__(self, target: Path, head: Path, kind: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        weights = WRITERS[kind](head)
        self.head = PlainHead(
            weights, self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        )

    @torch.inference_mode()
    def drafts(self, ids: list[int], count: int) -> list[int]:
        states = self.model(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
        taps = [states[layer + 1] for layer in LAYERS] if self.head.is_eagle3 else [states[-1]]
        return self.head.drafts(ids, [each[0] for each in taps], count)


PREEMPTED = Case("llama", budget=24, prefix_caching=True, preemption=True, overlap=True, device="cpu")
IN_ORDER = Case("qwen3", budget=64, prefix_caching=True, preemption=False, overlap=False, device="cpu")
TWO_GROUPS = Case("gemma3", budget=24, prefix_caching=True, preemption=True, overlap=True, device="cpu")
LONG_BLOCKS = Case("llama", budget=24, prefix_caching=True, preemption=False, overlap=True, device="fake-hostlen")
TWO_RANKS = Case("llama", budget=64, prefix_caching=False, preemption=True, overlap=True, device="cpu-tp2")
FULL = pytest.mark.full
WAYS = [
    pytest.param("eagle3", PREEMPTED, 1.0),
    pytest.param("eagle1-two-layers", IN_ORDER, 0.3),
    pytest.param("eagle3-own-embedding", PREEMPTED, 0.3, marks=FULL),
    pytest.param("eagle1", TWO_GROUPS, 1.0, marks=FULL),
    pytest.param("eagle3", TWO_GROUPS, 0.3, marks=FULL),
    pytest.param("eagle3", LONG_BLOCKS, 1.0, marks=FULL),
    pytest.param("eagle1", TWO_RANKS, 1.0, marks=FULL),
    pytest.param("eagle3", TWO_RANKS, 0.3, marks=FULL),
]


@pytest.mark.parametrize(("kind", "case", "how_often"), WAYS, ids=str)
def test_drafts_are_what_the_head_says_of_the_text_by_itself(kind, case, how_often, folder, monkeypatch):
    """Of sampled texts, which leave the guesses often: in chunks, behind prefix hits, after preemption, beside others.
    With `how_often` 0.3 the head is asked in a third of the steps, and follows the others later."""
    rng, target = random.Random(0), checkpoint(folder, case.family)
    reference = Reference(target, folder / kind, kind)
    depth, take, drafted = Speculator.depth, Proposing.take, list[tuple[list[int], list[int]]]()

    def sometimes(self, requests, most, *, num_rows):
        return depth(self, requests, most, num_rows=num_rows) if rng.random() < how_often else 0

    def watched(self, step, result):
        take(self, step, result)
        ids = memoryview(result.proposed).cast("i").tolist()
        for request, epoch, count in step.proposing:
            mine, ids = ids[:count], ids[count:]
            if request.epoch == epoch:
                drafted.append((request.token_ids, mine))

    monkeypatch.setattr(Speculator, "depth", sometimes)
    monkeypatch.setattr(Proposing, "take", watched)
    sampling = SamplingParams(temperature=0.4, seed=1, n=2, max_tokens=18, ignore_eos=True)
    with open_llm(case, target, speculate=f"eagle:{folder / kind}", max_drafts=MAX_DRAFTS) as llm:
        scheduler = llm.engine.scheduler
        scheduler.drafting.measured_costs_are_ignored()
        for _ in range(2):
            llm.generate(texts(), sampling)
        llm.engine.drain()
        assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_usable
        assert scheduler.stats.prefix_hits > 0 or not case.prefix_caching or case.device == "fake-hostlen"
        assert (scheduler.num_preemptions > 0) >= case.preemption
    assert len(drafted) > 30
    assert [ids for _, ids in drafted] == [reference.drafts(text, len(ids)) for text, ids in drafted]
