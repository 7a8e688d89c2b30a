"""Faults of steps that take or give hidden states, or positions of three axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor

from anychip.plugin_api import EmbeddingRows, ForwardExtras, KVPlan, ModelSource, StepInputs, StepLimits
from anychip_conformance.fakes.compiled import CompiledCall
from anychip_conformance.fakes.static import DonatedState, StaticHidden, StaticStepProgram
from anychip_conformance.faulty.registry import fault


class InputsFault(StaticStepProgram):
    """A fault changes what a step computes with; whoever reads its inputs afterwards sees what they should be."""

    def forward(self, state: DonatedState, inputs: StepInputs) -> Any:
        arena = inputs.arena.copy()
        self.change(inputs)
        result = super().forward(state, inputs)
        inputs.arena[:] = arena
        return result

    def change(self, inputs: StepInputs) -> None:
        raise NotImplementedError


# -- taps -----------------------------------------------------------------------------------------------------


class LayersFault(StaticStepProgram):
    """A fault taps other layers than it is told."""

    def __init__(self, source: ModelSource, kv: KVPlan, limits: StepLimits) -> None:
        super().__init__(source, kv, replace(limits, taps=tuple(self.other(limits.taps))))

    def other(self, taps: Sequence[int]) -> list[int]:
        raise NotImplementedError


@fault("step-taps-of-the-layer-before", "step", killed_by="step.taps.001")
class LayerBefore(LayersFault):
    """A layer's hidden states are what it reads, not what it hands on."""

    def other(self, taps: Sequence[int]) -> list[int]:
        return [layer - 1 if layer > 0 else layer for layer in taps]


@fault("step-taps-sorted", "step", killed_by="step.taps.001")
class Sorted(LayersFault):
    """Hidden states come in the order of the layers, not in that in which they are named."""

    def other(self, taps: Sequence[int]) -> list[int]:
        return sorted(taps)


class ExtrasFault(StaticStepProgram):
    """A fault is another method of ForwardExtras while a step is traced."""

    method = ""

    def _compile(self, fn: Callable[..., object], example: tuple[object, ...]) -> CompiledCall:
        def faulty(*values: object) -> object:
            with patch.object(ForwardExtras, self.method, self.changed(getattr(ForwardExtras, self.method))):
                return fn(*values)

        return super()._compile(faulty, example)

    def changed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        raise NotImplementedError


@fault("step-taps-without-the-residual", "step", killed_by="step.taps.001")
class WithoutTheResidual(ExtrasFault):
    """A layer's hidden states are its own output, without the residual."""

    method = "seen"

    def changed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda extras, layer, hidden, residual=None: method(extras, layer, hidden)


@fault("step-taps-of-the-token-before", "step", killed_by="step.taps.001")
class TokenBefore(InputsFault):
    """The hidden states are those of the tokens before."""

    def change(self, inputs: StepInputs) -> None:
        if inputs.tap_tokens is not None:
            inputs.tap_tokens[:] = np.maximum(inputs.tap_tokens - 1, 0)


@fault("step-taps-of-leading-tokens", "step", killed_by="step.taps.001")
class LeadingTokens(InputsFault):
    """As many tokens as are wanted are shown, from the step's first on."""

    def change(self, inputs: StepInputs) -> None:
        if inputs.tap_tokens is not None:
            inputs.tap_tokens[:] = np.arange(len(inputs.tap_tokens))


@fault("step-taps-late", "step", killed_by="step.taps.001")
class TapsLate(StaticStepProgram):
    """What is shown is of the last step of the same shape."""

    def forward(self, state: DonatedState, inputs: StepInputs) -> Any:
        state, hidden = super().forward(state, inputs)
        if inputs.tap_tokens is not None:
            kept = self.__dict__.setdefault("_kept", {})
            older = kept.get(inputs.key, hidden.taps)
            kept[inputs.key] = hidden.taps
            hidden = replace(hidden, taps=older)
        return state, hidden


@fault("step-taps-one-layer", "step", killed_by="step.taps.001")
class OneLayer(StaticStepProgram):
    """The first layer that is named is shown for all."""

    def taps(self, hidden: StaticHidden) -> Sequence[Tensor]:
        return [hidden.taps[0]] * len(hidden.taps)


# -- pooled vectors -------------------------------------------------------------------------------------------


@fault("step-pools-padding", "step", killed_by="step.pooled.001")
class PoolsPadding(InputsFault):
    """Padded tokens count for the step's last row."""

    def change(self, inputs: StepInputs) -> None:
        if inputs.pool_rows is not None:
            inputs.pool_rows[inputs.num_tokens :] = inputs.num_rows - 1


@fault("step-pools-the-next-row", "step", killed_by="step.pooled.001")
class PoolsTheNextRow(InputsFault):
    """A row's sum goes to the row behind it."""

    def change(self, inputs: StepInputs) -> None:
        if inputs.pool_rows is not None:
            counted = inputs.pool_rows < inputs.key.num_reqs
            inputs.pool_rows[counted] = (inputs.pool_rows[counted] + 1) % inputs.num_rows


@fault("step-pools-one-token-late", "step", killed_by="step.pooled.001")
class PoolsOneTokenLate(InputsFault):
    """The tokens that count are those behind the ones that should."""

    def change(self, inputs: StepInputs) -> None:
        if inputs.pool_rows is not None:
            inputs.pool_rows[:] = np.roll(inputs.pool_rows, 1)


@fault("step-pools-the-last-token", "step", killed_by="step.pooled.001")
class PoolsTheLastToken(InputsFault):
    """Of a row's tokens only the last counts."""

    def change(self, inputs: StepInputs) -> None:
        if inputs.pool_rows is not None:
            inputs.pool_rows[:-1][inputs.pool_rows[1:] == inputs.pool_rows[:-1]] = inputs.key.num_reqs


@fault("step-pools-on", "step", killed_by="step.pooled.001")
class PoolsOn(StaticStepProgram):
    """Sums are never begun anew: what a row of the step had before is still in them."""

    _before: Tensor | None = None

    def forward(self, state: DonatedState, inputs: StepInputs) -> Any:
        state, hidden = super().forward(state, inputs)
        if hidden.pooled is not None:
            if self._before is not None and self._before.shape == hidden.pooled.shape:
                hidden = replace(hidden, pooled=hidden.pooled + self._before)
            self._before = hidden.pooled
        return state, hidden


# -- embeddings -----------------------------------------------------------------------------------------------


@fault("step-embeddings-off-by-one", "step", killed_by="step.embeddings.001")
class OffByOne(InputsFault):
    """A token reads the row of the buffer behind its own."""

    def change(self, inputs: StepInputs) -> None:
        if inputs.embedding_rows is not None:
            given = inputs.embedding_rows >= 0
            inputs.embedding_rows[given] = (inputs.embedding_rows[given] + 1) % self.limits.max_embeddings


@fault("step-embeddings-at-the-next-token", "step", killed_by="step.embeddings.001")
class AtTheNextToken(InputsFault):
    """A row of the buffer is read at the token behind the one that it is for."""

    def change(self, inputs: StepInputs) -> None:
        if inputs.embedding_rows is not None:
            inputs.embedding_rows[:] = np.roll(inputs.embedding_rows, 1)


@fault("step-embeddings-stay", "step", killed_by="step.embeddings.001")
class EmbeddingsStay(StaticStepProgram):
    """A row of the buffer keeps what it was first given."""

    def embed(self, state: DonatedState, rows: Sequence[EmbeddingRows]) -> DonatedState:
        written = self.__dict__.setdefault("_written", set())
        fresh = [[index for index, row in enumerate(each.rows.tolist()) if row not in written] for each in rows]
        written |= {row for each in rows for row in each.rows.tolist()}
        pairs = zip(rows, fresh, strict=True)
        return super().embed(
            state, [EmbeddingRows(rows=each.rows[kept], values=each.values[kept]) for each, kept in pairs]
        )


@fault("step-embeddings-late", "step", killed_by="step.embeddings.001")
class EmbeddingsLate(StaticStepProgram):
    """Embeddings are written behind the step in which their request enters."""

    def forward(self, state: DonatedState, inputs: StepInputs) -> Any:
        waiting = self.__dict__.pop("_waiting", [])
        state, hidden = super().forward(state, inputs)
        return (super().embed(state, waiting) if waiting else state), hidden

    def embed(self, state: DonatedState, rows: Sequence[EmbeddingRows]) -> DonatedState:
        self._waiting = list(rows)
        return state


@fault("step-embeddings-of-the-first-row", "step", killed_by="step.embeddings.001")
class EmbeddingsOfTheFirstRow(InputsFault):
    """Every row of a step reads the embeddings of the first that has some."""

    def change(self, inputs: StepInputs) -> None:
        if inputs.embedding_rows is not None:
            given = np.flatnonzero(inputs.embedding_rows >= 0)
            owners = inputs.token_slots[given]
            first = inputs.embedding_rows[given[owners == owners[0]]]
            inputs.embedding_rows[given] = np.resize(first, len(given))


@fault("step-embeddings-added", "step", killed_by="step.embeddings.001")
class EmbeddingsAdded(ExtrasFault):
    """A row of the buffer is added to the token's own embedding."""

    method = "embedded"

    def changed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def added(extras: ForwardExtras, hidden: Tensor) -> Tensor:
            if extras.embedding_rows is None:
                return hidden
            found: Tensor = method(extras, hidden)
            return hidden + found.where((extras.embedding_rows >= 0).unsqueeze(-1), hidden * 0)

        return added


# -- positions of three axes ------------------------------------------------------------------------------------


class AxesFault(InputsFault):
    """A fault changes the rotary positions by axis."""

    def change(self, inputs: StepInputs) -> None:
        if inputs.rope_positions is not None:
            self.turn(inputs.rope_positions, inputs)

    def turn(self, positions: np.ndarray, inputs: StepInputs) -> None:
        raise NotImplementedError


@fault("step-axes-swapped", "step", killed_by="step.axes.001")
class AxesSwapped(AxesFault):
    """The second and the third axis are each other's."""

    def turn(self, positions: np.ndarray, inputs: StepInputs) -> None:
        positions[1:] = positions[:0:-1].copy()


@fault("step-axes-one", "step", killed_by="step.axes.001")
class OneAxis(AxesFault):
    """All frequencies turn by the first axis."""

    def turn(self, positions: np.ndarray, inputs: StepInputs) -> None:
        positions[:] = positions[0]


@fault("step-axes-in-the-text", "step", killed_by="step.axes.001")
class InTheText(AxesFault):
    """Rows of one token turn by their place in the text."""

    def turn(self, positions: np.ndarray, inputs: StepInputs) -> None:
        starts = inputs.query_start[: inputs.num_rows]
        alone = starts[np.diff(inputs.query_start[: inputs.num_rows + 1]) == 1]
        positions[:, alone] = inputs.positions[alone]


@fault("step-axes-of-the-token-before", "step", killed_by="step.axes.001")
class AxesOfTheTokenBefore(AxesFault):
    """A token turns by the positions of the one before."""

    def turn(self, positions: np.ndarray, inputs: StepInputs) -> None:
        positions[:, 1:] = positions[:, :-1].copy()


@fault("step-axes-in-another-order", "step", killed_by="step.axes.001")
class InAnotherOrder(AxesFault):
    """Frequencies are shared out among the axes in another order."""

    def turn(self, positions: np.ndarray, inputs: StepInputs) -> None:
        positions[:] = np.roll(positions, 1, axis=0)
