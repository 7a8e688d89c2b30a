"""Steps that take or give hidden states: taps, sums for pooled vectors, embeddings in place of tokens'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anychip.messages import StepResult
from anychip.plugin_api import FINAL, StepInputs
from anychip.prompt_extras import Pooling, PromptExtras
from anychip_conformance.case import Nothing, kind
from anychip_conformance.cases.test_steps import TEXT, expected
from anychip_conformance.choices import widest
from anychip_conformance.device import Device
from anychip_conformance.engines import checkpoint
from anychip_conformance.equality import HIDDEN_SIZE, NUM_LAYERS
from anychip_conformance.oracle.streams import stream_bound
from anychip_conformance.step_driver import StepDriver, tokens_of

_DEADLINE_S = 180.0
_NUM_TEXT = len(TEXT)
_OTHER = list(reversed(TEXT))
_SPLIT = 5
_LAYERS = (2, 0, FINAL)


def driven(device: Device, check: Callable[[StepDriver], None], **settings: Any) -> None:
    driver = StepDriver(device, checkpoint(device, "llama").path, **settings)
    try:
        check(driver)
    finally:
        driver.close()


def chunks(device: Device, count: int) -> list[int]:
    """A prompt's tokens in two parts, where the device takes parts of any size."""
    return [_SPLIT, count - _SPLIT] if device.platform.step_rules.chunk_multiple == 1 else [count]


def near(device: Device, found: np.ndarray, wanted: np.ndarray, what: str) -> None:
    """Within what two evaluations of the layers may differ by."""
    bound = float(np.abs(wanted).max()) * stream_bound(NUM_LAYERS, HIDDEN_SIZE, widest(device.capabilities))
    assert found.shape == wanted.shape, f"{what}: shape {found.shape}, expected {wanted.shape}"
    error = float(np.abs(found - wanted).max())
    assert error <= bound, f"{what}: off by {error:.2e}, at most {bound:.2e} may be"


# -- taps ---------------------------------------------------------------------------------------------------------


class TapReader:
    """Keeps hidden states by (slot, position), for each layer."""

    def __init__(self, driver: StepDriver) -> None:
        self.states: dict[tuple[int, int], list[np.ndarray]] = {}
        driver.worker.runner.read_taps = self.read

    def read(self, inputs: StepInputs, taps: Sequence[Tensor]) -> None:
        assert inputs.tap_tokens is not None and len(taps) == len(_LAYERS), f"{len(taps)} layers"
        shown = [torch.as_tensor(states).float().cpu().numpy() for states in taps]
        for index, token in enumerate(inputs.tap_tokens[: inputs.num_tapped].tolist()):
            place = (int(inputs.token_slots[token]), int(inputs.positions[token]))
            self.states[place] = [states[index].copy() for states in shown]


@kind("step.taps", deadline_s=_DEADLINE_S)
def taps(device: Device, case: Nothing) -> None:
    """The hidden states behind the layers that were named at the start, of the tokens that are asked for: of prompts in
    one step and in several, of drawn tokens, beside rows that ask for none, and in steps where nobody does."""

    def check(driver: StepDriver) -> None:
        reader = TapReader(driver)
        parts = chunks(device, _NUM_TEXT)
        new = {0: (TEXT, [1]), 3: (_OTHER, [2]), 1: (_OTHER, [3])}
        asked = {0: PromptExtras(tap_from=3), 1: PromptExtras(tap_from=0)}
        drawn: dict[int, list[int]] = {0: [], 1: [], 3: []}

        def step(tokens: dict[int, int], drawing: Sequence[int], **given: Any) -> None:
            for slot, token in zip(drawing, tokens_of(driver.step(tokens=tokens, **given)), strict=True):
                drawn[slot].append(token)

        first = [slot for slot in (3, 1) if len(parts) > 1] or [0, 3, 1]
        step({0: parts[0], 3: _NUM_TEXT, 1: _NUM_TEXT}, first, new=new, extras=asked)
        for count in parts[1:]:
            step({1: 1, 0: count}, [1, 0])
        step({3: 1, 0: 1, 1: 1}, [3, 0, 1])
        step({0: 1}, [0])
        before = set(reader.states)
        step({3: 1}, [3])
        assert set(reader.states) == before, "a step in which nobody asks shows hidden states"
        for slot, text, begin in ((0, TEXT, 3), (1, _OTHER, 0)):
            known = [*text, *drawn[slot][:-1]]
            _check_taps(device, {p: s for (owner, p), s in reader.states.items() if owner == slot}, known, begin)
        assert {slot for slot, _ in reader.states} == {0, 1}, "hidden states of a row that asks for none"

    driven(device, check, taps=_LAYERS)


def _check_taps(device: Device, found: Mapping[int, list[np.ndarray]], ids: list[int], begin: int) -> None:
    assert sorted(found) == list(range(begin, len(ids))), f"hidden states of positions {sorted(found)}"
    states = checkpoint(device, "llama").hidden_states(ids, widest(device.capabilities))
    for index, layer in enumerate(_LAYERS):
        rows = np.stack([found[position][index] for position in sorted(found)])
        near(device, rows, states[layer][begin:], f"layer {layer}")


# -- pooled vectors -----------------------------------------------------------------------------------------------


def _vectors(device: Device, ids: list[int]) -> dict[str, np.ndarray]:
    """By kind of pooling, not normalized."""
    states = checkpoint(device, "llama").hidden_states(ids, widest(device.capabilities))[FINAL]
    return {"last": states[-1], "mean": states.mean(axis=0), "cls": states[0]}


def _vector(result: StepResult, row: int) -> np.ndarray:
    return np.frombuffer(result.vectors[row], dtype=np.float32)


@kind("step.pooled", deadline_s=_DEADLINE_S)
def pooled(device: Device, case: Nothing) -> None:
    """A row's vector is of its own tokens, all of them and no others, whether its prompt is computed in one step or in
    several; rows that draw beside it draw what they always do, and a slot's next owner has a vector of its own."""

    def check(driver: StepDriver) -> None:
        extras = {
            slot: PromptExtras(pooling=Pooling(kind, normalize=False))
            for slot, kind in {0: "mean", 1: "last", 2: "cls"}.items()
        }
        new = {slot: (TEXT, [slot + 1]) for slot in range(4)}
        parts = chunks(device, _NUM_TEXT)
        results = [driver.step(new=new, tokens={3: _NUM_TEXT, **dict.fromkeys(range(3), parts[0])}, extras=extras)]
        for count in parts[1:]:
            results.append(driver.step(tokens={0: count, 3: 1, 1: count, 2: count}))
            assert not results[0].vectors, "a vector of part of a prompt"
        drawn = [token for result in results for token in tokens_of(result)]
        assert drawn == expected(device, len(results)), f"beside rows with vectors: drew {drawn}"
        rows = {"mean": 0, "last": 2, "cls": 3} if len(parts) > 1 else {"mean": 1, "last": 2, "cls": 3}
        wanted = _vectors(device, TEXT)
        for kind_, row in rows.items():
            near(device, _vector(results[-1], row), wanted[kind_], kind_)
        again = driver.step(
            new={0: (_OTHER, [1])}, tokens={0: _NUM_TEXT}, finished=[0, 1, 2],
            extras={0: PromptExtras(pooling=Pooling("mean", normalize=True))},
        )  # fmt: skip
        mean = _vectors(device, _OTHER)["mean"]
        near(device, _vector(again, 0), mean / np.linalg.norm(mean), "the slot's next owner")
        assert tokens_of(again) == [], "a row with a vector drew a token"

    driven(device, check, pooling=True)
