"""Steps that take or give hidden states, or positions of three axes."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anychip.plugin_api import FINAL, StepInputs
from anychip.prompt_extras import Pooling, PromptExtras
from anychip.step_messages import StepResult
from anychip_conformance.case import Nothing, kind
from anychip_conformance.cases.test_steps import TEXT, expected, most_likely
from anychip_conformance.choices import widest
from anychip_conformance.device import Device
from anychip_conformance.engines import checkpoint
from anychip_conformance.equality import HIDDEN_SIZE, NUM_LAYERS
from anychip_conformance.oracle.streams import stream_bound
from anychip_conformance.step_driver import StepDriver, tokens_of

_DEADLINE_S = 240.0
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


# -- embeddings in place of tokens' -------------------------------------------------------------------------------

_SPANS = ((2, 4), (8, 2))
"""(start, length) in a prompt as long as TEXT: a part of the prompt ends within the first."""


def _embedded(device: Device, ids: list[int]) -> PromptExtras:
    """The spans' embeddings are those of `ids`."""
    table = checkpoint(device, "llama").model.get_input_embeddings().weight.detach().float().numpy()
    places = [at for start, length in _SPANS for at in range(start, start + length)]
    values = np.ascontiguousarray(table[[ids[at] for at in places]], dtype=np.float32)
    return PromptExtras(embedded=_SPANS, embeddings=values.tobytes())


def _spliced(text: list[int], others: list[int] | int) -> list[int]:
    """`text` with the spans' tokens out of `others`."""
    ids = list(text)
    for start, length in _SPANS:
        for at in range(start, start + length):
            ids[at] = others if isinstance(others, int) else others[at]
    return ids


@kind("step.embeddings", deadline_s=_DEADLINE_S)
def embeddings(device: Device, case: Nothing) -> None:
    """Embeddings that are a token's own give what the token gives, in one step and in several, beside rows without any;
    each row has its own, and those of a request that has left are nobody's."""

    def check(driver: StepDriver) -> None:
        mixed = _spliced(TEXT, _OTHER)
        hidden = _spliced(TEXT, 3)  # the tokens that stand where embeddings are
        plain, parts = expected(device, 3), chunks(device, _NUM_TEXT)
        new = {0: (hidden, [1]), 1: (hidden, [2]), 2: (TEXT, [3])}
        asked = {0: _embedded(device, TEXT), 1: _embedded(device, _OTHER)}
        drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}
        tokens = {2: _NUM_TEXT, 0: parts[0], 1: parts[0]}
        found = tokens_of(driver.step(new=new, tokens=tokens, extras=asked))
        for slot, token in zip((2, 0, 1), found, strict=False):
            drawn[slot].append(token)
        for count in parts[1:]:
            for slot, token in zip((1, 2, 0), tokens_of(driver.step(tokens={1: count, 2: 1, 0: count})), strict=True):
                drawn[slot].append(token)
        for slot, token in zip((0, 1, 2), tokens_of(driver.step(tokens={0: 1, 1: 1, 2: 1})), strict=True):
            drawn[slot].append(token)
        assert drawn[2] == plain[: len(drawn[2])], f"without embeddings: drew {drawn[2]}"
        assert drawn[0] == plain[:2], f"a text's own embeddings: drew {drawn[0]}, expected {plain[:2]}"
        wanted = [most_likely(device, mixed, without=set())]
        wanted.append(most_likely(device, [*mixed, *wanted], without=set()))
        assert drawn[1] == wanted, f"other embeddings: drew {drawn[1]}, expected {wanted}"
        # The rows of the buffer get other owners: the first to enter has what the second of those before had.
        again = driver.step(
            new={4: (hidden, [2]), 1: (hidden, [1])}, tokens={1: _NUM_TEXT, 4: _NUM_TEXT}, finished=[0, 1],
            extras={1: _embedded(device, TEXT), 4: _embedded(device, _OTHER)},
        )  # fmt: skip
        assert tokens_of(again) == [plain[0], wanted[0]], f"the next owners: drew {tokens_of(again)}"

    driven(device, check, max_embeddings=12)


# -- positions of three axes --------------------------------------------------------------------------------------


def _sections(head_dim: int) -> list[int]:
    """Of the head_dim / 2 frequencies, by axis."""
    half = head_dim // 2
    return [half - 2 * (half // 3), half // 3, half // 3]


_THETA = 4.0
"""Of the rotary embedding: every frequency turns far within a few positions."""


def _picture() -> np.ndarray:
    """Positions [3, tokens of TEXT]: text, a grid of two by three, text."""
    grid = [[2, 2 + at // 3, 2 + at % 3] for at in range(6)]
    behind = [[5 + at] * 3 for at in range(_NUM_TEXT - 8)]
    return np.array([[0] * 3, [1] * 3, *grid, *behind], dtype=np.int32).T.copy()


@kind("step.axes", deadline_s=_DEADLINE_S)
def axes(device: Device, case: Nothing) -> None:
    """Each frequency turns by its axis's position, in prompts and in what is drawn behind them, in one step and in
    several, beside rows that have one position a token; three equal positions are as good as one."""
    model, dtype = checkpoint(device, "llama"), widest(device.capabilities)
    sections, picture, limit = _sections(model.model.config.head_dim), _picture(), _NEAR[dtype]

    def check(driver: StepDriver) -> None:
        parts = chunks(device, _NUM_TEXT)
        equal = np.broadcast_to(np.arange(_NUM_TEXT, dtype=np.int32), (3, _NUM_TEXT))
        new = {slot: (TEXT, [slot + 1]) for slot in range(3)}
        asked = {0: PromptExtras(positions=picture.tobytes()), 2: PromptExtras(positions=equal.tobytes())}
        results = [driver.step(new=new, tokens={0: parts[0], 1: _NUM_TEXT, 2: _NUM_TEXT}, extras=asked)]
        for count in parts[1:]:
            results.append(driver.step(tokens={1: 1, 0: count}))
        place = len(parts) - 1  # of slot 0 among the last step's samples; in parts, slot 1 draws before it
        drawn = tokens_of(results[-1])[place]
        wanted = model.turned_logits(TEXT, dtype, picture, sections, _THETA)
        _near_logprobs(results[-1], place, wanted, "behind the picture", limit)
        wanted = model.turned_logits(TEXT, dtype, equal, sections, _THETA)
        for slot, at in ((1, 1 - place), (2, 2 - place)):
            _near_logprobs(results[0], at, wanted, f"slot {slot}, positions of the text", limit)
        text = [*TEXT, tokens_of(results[0])[2 - place]]
        behind = driver.step(tokens={2: 1, 0: 1})
        wanted = model.turned_logits(
            text, dtype, np.broadcast_to(np.arange(len(text)), (3, len(text))), sections, _THETA
        )
        _near_logprobs(behind, 0, wanted, "behind equal positions", limit)
        following = np.concatenate((picture, np.full((3, 1), picture.max() + 1, dtype=np.int32)), axis=1)
        wanted = model.turned_logits([*TEXT, drawn], dtype, following, sections, _THETA)
        _near_logprobs(behind, 1, wanted, "behind the token that was drawn", limit)

    with tempfile.TemporaryDirectory(prefix="anychip-axes-") as folder:
        copied = Path(folder) / "model"
        shutil.copytree(model.path, copied)
        config = json.loads((copied / "config.json").read_text())
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": _THETA, "mrope_section": sections}
        (copied / "config.json").write_text(json.dumps(config))
        driver = StepDriver(device, copied)
        try:
            check(driver)
        finally:
            driver.close()


_NEAR = {"float32": 0.02, "float16": 0.05, "bfloat16": 0.1}
"""Between log-probabilities, by the widest dtype that a device has: positions that are wrong on one axis move them by
more."""


def _near_logprobs(result: StepResult, place: int, logits: np.ndarray, what: str, limit: float) -> None:
    found = result.logprobs[place]
    wanted = (logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())[found.top_ids]
    error = float(np.abs(np.array(found.top) - wanted).max())
    assert error <= limit, f"{what}: log-probabilities are off by {error:.3f}"
