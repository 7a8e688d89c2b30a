"""The whole engine on the device: tiny models against transformers, in every way that a request can be run."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np

from anychip import SamplingParams
from anychip_conformance import drafts
from anychip_conformance.case import kind
from anychip_conformance.choices import widest
from anychip_conformance.device import Device
from anychip_conformance.engines import (
    MAX_MODEL_LEN,
    Checkpoint,
    checkpoint,
    logits_bound,
    open_llm,
    preempt_often,
    prompts,
)
from anychip_conformance.oracle import vectorised as oracle
from anychip_conformance.oracle.vectorised import Bounded

_DEADLINE_S = 180.0
_NUM_TOKENS = 8
_TOP = 20


class EngineCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`mode` is how the requests are run: all at once, in chunks of a few tokens, over a shared prefix that is cached,
    preempted every few steps, without overlap, or on two devices."""

    family: Literal["llama", "qwen3-moe", "gemma2", "gpt-oss"] = "llama"
    mode: Literal["plain", "chunked", "prefix", "preempted", "in_order", "tp2"] = "plain"


def settings_of(device: Device, mode: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"prefix_caching": mode == "prefix"}
    if mode == "chunked":
        settings["max_num_batched_tokens"] = 16
    if mode == "in_order":
        settings["overlap"] = False
    if mode == "tp2":
        device.need("collectives", device.capabilities.collectives != "none")
        device.limit("its collectives are the compiler's", device.capabilities.collectives == "runtime")
        device.limit("one device, the case has two", len(device.probe.devices) >= 2)
        settings["tensor_parallel_size"] = 2
    return settings


def expected_tokens(device: Device, model: Checkpoint, prompt: list[int]) -> tuple[list[int], list[float], list[float]]:
    """Greedy tokens, the margin of each over the second best, and how far logits may lie apart."""
    ids, tokens, margins, bounds = list(prompt), [], [], []
    for _ in range(_NUM_TOKENS):
        logits = model.logits(ids, widest(device.capabilities))
        best = np.argsort(-logits, kind="stable")[:2]
        tokens.append(int(best[0]))
        margins.append(float(logits[best[0]] - logits[best[1]]))
        bounds.append(2 * logits_bound(device, model, ids))
        ids.append(tokens[-1])
    return tokens, margins, bounds


def check_greedy(device: Device, case: EngineCase) -> None:
    model = checkpoint(device, case.family)
    sampling = SamplingParams(temperature=0, max_tokens=_NUM_TOKENS, ignore_eos=True)
    with open_llm(device, model.path, **settings_of(device, case.mode)) as llm:
        if case.mode == "preempted":
            preempt_often(llm.engine.scheduler)
        outputs = [output.outputs[0].token_ids for output in llm.generate(prompts(), sampling)]
        if case.mode == "prefix":
            again = [output.outputs[0].token_ids for output in llm.generate(prompts(), sampling)]
            assert again == outputs, "tokens over a cached prefix differ from those without"
    for index, got in enumerate(outputs):
        check_tokens(device, model, case.family, index, got)


def check_tokens(device: Device, model: Checkpoint, name: str, index: int, got: list[int]) -> None:
    """Of the prompt of that index. What is expected of it is worked out once per `name` of a model."""
    cache, prompt = device.resources.setdefault("expected tokens", {}), prompts()[index]
    if (name, index) not in cache:
        cache[name, index] = expected_tokens(device, model, prompt)
    tokens, margins, bounds = cache[name, index]
    for place, (wanted, token) in enumerate(zip(tokens, got, strict=True)):
        if wanted == token:
            continue
        assert margins[place] < bounds[place], (
            f"{name}, prompt of {len(prompt)} tokens: token {place} is {token}, expected {wanted}, "
            f"{margins[place]:.3g} ahead of its second; evaluations may differ by {bounds[place]:.3g}"
        )
        break  # after an excused difference the texts go their own ways


@kind(
    "e2e.greedy",
    corpus=[
        EngineCase(),
        *[EngineCase(family=family) for family in ("qwen3-moe", "gemma2", "gpt-oss")],  # type: ignore[arg-type]
        *[EngineCase(mode=mode) for mode in ("chunked", "prefix", "preempted", "in_order")],  # type: ignore[arg-type]
        EngineCase(family="gemma2", mode="chunked"),
        EngineCase(family="gemma2", mode="preempted"),
        EngineCase(family="qwen3-moe", mode="prefix"),
    ],
    deadline_s=_DEADLINE_S,
    quick=3,
)
def greedy(device: Device, case: EngineCase) -> None:
    """Greedy tokens equal transformers', whatever the scheduler does with the requests. A first difference is excused
    where the two best logits are closer than two evaluations may lie apart."""
    check_greedy(device, case)


@kind(
    "e2e.tensor_parallel",
    profile="distributed",
    corpus=[EngineCase(family=family, mode="tp2") for family in ("llama", "qwen3-moe", "gemma2")],  # type: ignore[arg-type]
    deadline_s=_DEADLINE_S,
)
def tensor_parallel(device: Device, case: EngineCase) -> None:
    """The same on two devices: every rank's share at its place, and every rank drawing the same tokens."""
    check_greedy(device, case)


@kind("e2e.logprobs", corpus=[EngineCase(), EngineCase(family="gemma2")], deadline_s=_DEADLINE_S, quick=0)
def logprobs(device: Device, case: EngineCase) -> None:
    """Teacher-forced: after every prompt, the likeliest tokens have transformers' log-probabilities, within a bound."""
    model = checkpoint(device, case.family)
    given = [prompt[:MAX_MODEL_LEN] for prompt in prompts()]
    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=_TOP, ignore_eos=True)
    with open_llm(device, model.path) as llm:
        outputs = llm.generate(given, sampling)
    for prompt, output in zip(given, outputs, strict=True):
        logits = model.logits(prompt, widest(device.capabilities))
        expected = oracle.log_softmax(logits)
        found = output.outputs[0].logprobs
        assert found, "no log-probabilities came back"
        ids = found[0].top_ids
        value = device.tensor(found[0].top, "float32")
        bound = np.full(len(ids), 2 * logits_bound(device, model, prompt)) + expected.bound[ids]
        device.compare(
            f"log-probabilities after {len(prompt)} tokens", value, Bounded(expected.value[ids], bound),
            label=f"end to end/{widest(device.capabilities)}",
        )  # fmt: skip


class DraftCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the requests draw, and how they are run."""

    draws: Literal["greedy", "sampled", "edited"] = "greedy"
    mode: Literal["plain", "chunked", "preempted", "prefix"] = "plain"


_DRAWS = {
    "greedy": SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    "sampled": SamplingParams(temperature=1.0, top_p=0.95, seed=5, n=2, max_tokens=12, ignore_eos=True),
    "edited": SamplingParams(
        temperature=0.8,
        seed=6,
        max_tokens=12,
        repetition_penalty=1.3,
        frequency_penalty=0.5,
        logit_bias={5: 4.0},
        min_tokens=6,
    ),
}


@kind(
    "e2e.speculated",
    corpus=[
        DraftCase(),
        DraftCase(draws="sampled", mode="chunked"),
        DraftCase(draws="edited", mode="preempted"),
        DraftCase(draws="edited", mode="prefix"),
    ],
    deadline_s=_DEADLINE_S,
    quick=1,
)
def speculated(device: Device, case: DraftCase) -> None:
    """With drafts, most right and some wrong, every request gets the tokens that it gets without."""
    device.limit("its steps take no drafts", device.platform.step_rules.takes_drafts)
    device.need_dtype("float32")
    model, sampling = checkpoint(device, "llama"), _DRAWS[case.draws]
    answers: list[list[list[int]]] = []
    for speculation in ({}, {"speculate": drafts.NAME, "max_drafts": 4}):
        settings = {**settings_of(device, case.mode), "dtype": "float32", **speculation}
        with open_llm(device, model.path, **settings) as llm:
            if case.mode == "preempted":
                preempt_often(llm.engine.scheduler)
            if case.mode == "prefix":
                llm.generate(prompts(), sampling)
            if (drafting := llm.engine.scheduler.drafting) is not None:
                drafting.measured_costs_are_ignored()
            outputs = llm.generate(prompts(), sampling)
            stats = llm.engine.scheduler.stats.speculation
        answers.append([sequence.token_ids for output in outputs for sequence in output.outputs])
        drafts.Answers.texts = [
            [*output.prompt_token_ids, *sequence.token_ids] for output in outputs for sequence in output.outputs
        ]
    assert stats is not None and stats.accepted > 8, f"{stats}: there were too few drafts to judge"
    assert stats.drafted > stats.accepted, f"{stats}: no draft was wrong"
    assert answers[0] == answers[1], f"with drafts {answers[1]}, without {answers[0]}"


@kind(
    "e2e.sampled",
    profile="distributed",
    corpus=[EngineCase(mode="tp2")],
    deadline_s=_DEADLINE_S,
)
def sampled(device: Device, case: EngineCase) -> None:
    """Seeded sampling on two devices gives the tokens that one device gives: ranks do not draw for themselves."""
    model = checkpoint(device, case.family)
    sampling = SamplingParams(temperature=1.0, top_p=0.95, seed=5, max_tokens=_NUM_TOKENS, ignore_eos=True)
    answers = []
    for settings in ({}, settings_of(device, case.mode)):
        with open_llm(device, model.path, **settings) as llm:
            answers.append([output.outputs[0].token_ids for output in llm.generate(prompts(), sampling)])
    assert answers[0] == answers[1], "two ranks drew other tokens than one"


@kind(
    "e2e.seeded",
    corpus=[EngineCase(), EngineCase(mode="preempted"), EngineCase(mode="chunked")],
    deadline_s=_DEADLINE_S,
    quick=0,
)
def seeded(device: Device, case: EngineCase) -> None:
    """The first drawn token is the one that the seed, the position and transformers' logits name; both of n = 2 draw
    by themselves."""
    device.need("seeded_sampling", device.capabilities.seeded_sampling)
    model = checkpoint(device, case.family)
    given, seed = prompts()[2:6], 1234
    sampling = SamplingParams(temperature=1.0, n=2, seed=seed, max_tokens=3, ignore_eos=True)
    with open_llm(device, model.path, **settings_of(device, case.mode)) as llm:
        if case.mode == "preempted":
            preempt_often(llm.engine.scheduler)
        outputs = llm.generate(given, sampling)
    for prompt, output in zip(given, outputs, strict=True):
        for index, sequence in enumerate(output.outputs):
            logits = model.logits(prompt, widest(device.capabilities))
            accepted = oracle.acceptable_tokens(
                logits,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_p=0.0,
                uniform=oracle.philox_uniform(seed, index, len(prompt)),
                slack=float(np.expm1(2 * logits_bound(device, model, prompt))),
            )
            token = sequence.token_ids[0]
            assert token in accepted, (
                f"prompt of {len(prompt)}, sequence {index}: drew {token}, expected {sorted(accepted)}"
            )
