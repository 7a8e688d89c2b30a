"""Drafts do not bend the dice: twenty thousand draws follow the model's own distribution, with drafts and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from heads_kit import write_eagle1, write_eagle3
from hostile_proposers import FAVOURITES, Favourites, found_by_name  # noqa: F401 - a fixture
from mtp_kit import write_mtp
from transformers import PreTrainedModel

from anychip import LLM, SamplingParams
from anychip_conformance.equality.tiny_models import make_checkpoint

VOCAB_SIZE = 50
PROMPT = [3, 14, 15, 9, 26]
NUM_DRAWS = 20_000
SEQUENCES = 125
"""Of one request. Each draws by its index, beside the request's seed and the position."""
LEAST_BY_CHANCE = NUM_DRAWS // 100
"""Guesses of a head that knows nothing, of which so many must be drawn at least."""
LEAST_EXPECTED = 5.0
"""Draws that a cell of the test must have by right; what has fewer is counted in one cell."""
LEAST_P = 1e-4


def draws(checkpoint: Path, least_accepted: int = NUM_DRAWS // 20, **settings: object) -> list[tuple[int, ...]]:
    """The first three tokens of every sequence. The first comes from the prompt; the others may be drafted."""
    sampling = [
        SamplingParams(temperature=1.0, seed=seed, n=SEQUENCES, max_tokens=4, ignore_eos=True)
        for seed in range(NUM_DRAWS // SEQUENCES)
    ]
    with LLM(
        str(checkpoint),
        skip_tokenizer=True,
        device="cpu",
        dtype="float32",
        max_model_len=16,
        max_num_seqs=256,
        max_waiting=NUM_DRAWS,
        **settings,
    ) as llm:
        drafting = llm.engine.scheduler.drafting
        if drafting is not None:
            drafting.measured_costs_are_ignored()
        outputs = llm.generate([PROMPT] * len(sampling), sampling)
        if drafting is not None:
            assert drafting.stats.accepted > least_accepted, drafting.stats
    return [tuple(one.token_ids[:3]) for output in outputs for one in output.outputs]


@torch.inference_mode()
def distributions(model: PreTrainedModel) -> list[torch.Tensor]:
    """Of the second token and of the third, whatever stood before them; by transformers, in float64."""
    model = model.double()

    def after(texts: torch.Tensor) -> torch.Tensor:
        parts = texts.split(500)
        return torch.cat([model(part, use_cache=False).logits[:, -1].softmax(-1) for part in parts])

    ids = torch.arange(VOCAB_SIZE)
    prompt = torch.tensor([PROMPT])
    first = after(prompt)[0]
    second = first[:, None] * after(torch.cat((prompt.expand(VOCAB_SIZE, -1), ids[:, None]), 1))  # [first, second]
    pairs = torch.cartesian_prod(ids, ids)
    third = second.flatten() @ after(torch.cat((prompt.expand(len(pairs), -1), pairs), 1))
    return [second.sum(0), third]


def p_value(drawn: list[int], distribution: torch.Tensor) -> float:
    """Of Pearson's chi-square test."""
    expected = distribution * len(drawn)
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCAB_SIZE).double()
    rare = expected < LEAST_EXPECTED
    if rare.any():
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), statistic / 2))


@pytest.mark.full
def test_draws_follow_the_models_distribution_with_drafts_and_without(tmp_path, monkeypatch):
    model = make_checkpoint("llama", tmp_path, vocab_size=VOCAB_SIZE)
    exact = distributions(model)
    monkeypatch.setattr(Favourites, "ids", exact[0].topk(2).indices.tolist())
    without = draws(tmp_path)
    assert len(without) == NUM_DRAWS
    assert draws(tmp_path, speculate=FAVOURITES, max_drafts=2) == without
    check(without, exact)


@pytest.mark.full
@pytest.mark.parametrize("write", [write_eagle1, write_eagle3], ids=["eagle1", "eagle3"])
def test_draws_follow_the_distribution_behind_a_heads_drafts(write, tmp_path):
    """Of random weights: few of its guesses are drawn, and a random one of fifty would be a fiftieth."""
    exact = distributions(make_checkpoint("llama", tmp_path / "model", vocab_size=VOCAB_SIZE))
    write(tmp_path / "head", vocab_size=VOCAB_SIZE)
    speculate = f"eagle:{tmp_path / 'head'}"
    drawn = draws(tmp_path / "model", LEAST_BY_CHANCE, speculate=speculate, max_drafts=2)
    assert drawn == draws(tmp_path / "model")
    check(drawn, exact)


@pytest.mark.full
def test_draws_follow_the_distribution_behind_the_drafts_of_the_models_own_head(tmp_path):
    plain = write_mtp("glm4-moe", tmp_path, vocab_size=VOCAB_SIZE)
    drawn = draws(tmp_path, LEAST_BY_CHANCE, speculate="mtp", max_drafts=2)
    assert drawn == draws(tmp_path)
    check(drawn, distributions(plain.target))


def check(without: list[tuple[int, ...]], exact: list[torch.Tensor]) -> None:
    for place, distribution in enumerate(exact, start=1):
        p = p_value([tokens[place] for tokens in without], distribution)
        assert p > LEAST_P, f"token {place}: p is {p}"
