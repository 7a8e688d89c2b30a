"""Drafts do not bend the dice: twenty thousand draws follow the model's own distribution, with drafts and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from heads_kit import write_eagle1
from hostile_proposers import FAVOURITES, Favourites, found_by_name  # noqa: F401 - a fixture
from mtp_kit import MODULE, WEIGHTS, write_mtp
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from anychip import LLM, SamplingParams
from anychip_conformance.equality import HIDDEN_SIZE
from anychip_conformance.equality.tiny_models import make_checkpoint

VOCAB_SIZE = 50
PROMPT = [3, 14, 15, 9, 26]
NUM_DRAWS = 20_000
SEQUENCES = 125
"""Of one request. Each draws by its index, beside the request's seed and the position."""
LEAST_EXPECTED = 5.0
"""Draws that a cell of the test must have by right; what has fewer is counted in one cell."""
LEAST_P = 1e-4


def draws(checkpoint: Path, **settings: object) -> list[tuple[int, ...]]:
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
            assert drafting.stats.accepted > NUM_DRAWS / 20, drafting.stats
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


@torch.inference_mode()
def bigrams(model: PreTrainedModel, embedded: torch.Tensor) -> torch.Tensor:
    """[hidden_size, hidden_size]: from what stands for a token, [VOCAB_SIZE, hidden_size], to what the output head
    takes for the token that the model likes best behind the prompt and that one."""
    ids = torch.arange(VOCAB_SIZE)
    texts = torch.cat((torch.tensor([PROMPT]).expand(VOCAB_SIZE, -1), ids[:, None]), 1)
    favourites = model(texts, use_cache=False).logits[:, -1].argmax(-1)
    wanted = torch.linalg.pinv(model.get_output_embeddings().weight).T[favourites]
    return torch.linalg.lstsq(embedded, wanted).solution.T.contiguous()


def write_knowing_eagle(folder: Path, model: PreTrainedModel) -> None:
    """Its layer adds nothing to what its projection makes of the token alone."""
    weights = write_eagle1(folder, vocab_size=VOCAB_SIZE)
    knowing = bigrams(model, model.get_input_embeddings().weight.detach())
    weights["fc.weight"] = torch.cat((knowing, torch.zeros_like(knowing)), dim=1)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = torch.zeros_like(weights[name])
    save_file(weights, folder / "model.safetensors")


def write_knowing_mtp(folder: Path) -> PreTrainedModel:
    """As write_knowing_eagle; returns the target."""
    model = write_mtp("glm4-moe", folder, vocab_size=VOCAB_SIZE).target
    model.set_experts_implementation("eager")  # others know no float64
    embedded = torch.nn.functional.rms_norm(model.get_input_embeddings().weight.detach(), (HIDDEN_SIZE,))
    knowing, tensors = bigrams(model, embedded), load_file(folder / WEIGHTS)
    for name in list(tensors):
        if name.startswith(MODULE) and name.endswith(("enorm.weight", "shared_head.norm.weight")):
            tensors[name] = torch.ones_like(tensors[name])
        if name.startswith(MODULE) and ("o_proj" in name or "down_proj" in name):
            tensors[name] = torch.zeros_like(tensors[name])
    tensors[f"{MODULE}.eh_proj.weight"] = torch.cat((knowing, torch.zeros_like(knowing)), dim=1)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return model


@pytest.mark.full
@pytest.mark.parametrize("kind", ["eagle", "mtp"])
def test_draws_follow_the_distribution_behind_the_drafts_of_a_head(kind, tmp_path):
    """Of heads that know what the model likes behind each token, so that many of their drafts are drawn."""
    folder = tmp_path / "model"
    if kind == "mtp":
        model, speculate = write_knowing_mtp(folder), "mtp"
    else:
        model, speculate = make_checkpoint("llama", folder, vocab_size=VOCAB_SIZE), f"eagle:{tmp_path / 'head'}"
        write_knowing_eagle(tmp_path / "head", model)
    drawn = draws(folder, speculate=speculate, max_drafts=2)
    assert drawn == draws(folder)
    check(drawn, distributions(model))


def check(without: list[tuple[int, ...]], exact: list[torch.Tensor]) -> None:
    for place, distribution in enumerate(exact, start=1):
        p = p_value([tokens[place] for tokens in without], distribution)
        assert p > LEAST_P, f"token {place}: p is {p}"
