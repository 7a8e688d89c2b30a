"""Adapters in requests: tokens are those of transformers' model with the adapter merged in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from anychip import LLM, SamplingParams
from anychip_conformance.equality.tiny_adapters import FIVE
from anychip_conformance.equality.tiny_models import make_checkpoint

NAMES = [f"a{number}" for number in range(len(FIVE))]
TEXT = [3 + at * 37 % 500 for at in range(40)]
PROMPTS = [TEXT, TEXT[:17], TEXT[20:23], [7], TEXT[:33] + [5] * 6, TEXT[5:30]]
NUM_TOKENS = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
DEVICES = {
    "cpu": {"device": "cpu"},
    "cpu-tp2": {"device": "cpu", "tensor_parallel_size": 2},
    "fake-static": {"device": "fake-static", "max_num_batched_tokens": 16},  # one shape is traced
    "fake-hostlen": {"device": "fake-hostlen"},
}


class Base:
    """A tiny model's folder, its five adapters' folders, and what each draws for each prompt."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = folder / "model"
        self.model = make_checkpoint(family, self.folder).float()
        self.adapters = {
            name: str(tiny.save(self.model, folder / name)) for name, tiny in zip(NAMES, FIVE, strict=True)
        }
        models = {None: self.model} | {name: tiny.merged(self.model) for name, tiny in zip(NAMES, FIVE, strict=True)}
        self.expected = {name: [greedy(model, ids) for ids in PROMPTS] for name, model in models.items()}

    def opened(self, **more: object) -> LLM:
        given: dict[str, object] = {
            "dtype": "float32", "skip_tokenizer": True, "max_model_len": 96, "max_num_seqs": 8,
            "adapters": self.adapters,
        }  # fmt: skip
        return LLM(str(self.folder), **{**given, **more})


@torch.inference_mode()
def greedy(model: torch.nn.Module, ids: Sequence[int]) -> list[int]:
    """What transformers' model draws."""
    known = list(ids)
    for _ in range(NUM_TOKENS):
        known.append(int(model(torch.tensor([known])).logits[0, -1].argmax()))
    return known[len(ids) :]


def drawn(llm: LLM, adapter: str | Sequence[str | None] | None) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, adapter=adapter)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base("llama", tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_of_five_adapters_and_none_draws_what_each_draws_alone(base: Base, device: str) -> None:
    names = [*NAMES, None]
    assert len({tuple(map(tuple, tokens)) for tokens in base.expected.values()}) == 6, "adapters that change nothing"
    with base.opened(**DEVICES[device]) as llm:
        for turn in range(2):  # the second time around, prompts are in the prefix cache under other adapters
            each = names[turn:] + names[:turn]
            wanted = [base.expected[name][number] for number, name in enumerate(each)]
            assert drawn(llm, each) == wanted
        assert drawn(llm, None) == base.expected[None]
        assert drawn(llm, "a2") == base.expected["a2"]
