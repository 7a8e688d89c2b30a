"""What some of the worker's rows take or ask for beside tokens, by slot, and a step's arrays for it.

Most engines have no such row: everything here is then false, and a step passes it by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from anychip.plugin_api import EMBEDDINGS, MROPE, NUM_AXES, POOLED, SEGMENTS, TAPS, EmbeddingRows, StepLimits
from anychip.prompt_extras import NO_TAPS, Pooling
from anychip.step_messages import NewRow

Views = dict[str, np.ndarray]


@dataclass(slots=True)
class PooledVector:
    """A row's vector as its steps bring it: sums of final hidden states, in launch order."""

    pooling: Pooling
    num_prompt: int
    total: np.ndarray | None = None  # [hidden_size] float32

    def add(self, total: np.ndarray) -> None:
        self.total = total.copy() if self.total is None else self.total + total

    def pooled(self) -> np.ndarray:
        """[hidden_size] float32, before head and normalization."""
        assert self.total is not None, "no token of the prompt counted"
        first, end = self.pooling.tokens(self.num_prompt)
        return np.asarray(self.total / np.float32(end - first), dtype=np.float32)

    def finished(self, vector: np.ndarray) -> bytes:
        """float32: what is served, once the head was applied where it was asked for."""
        if self.pooling.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        return vector.astype(np.float32).tobytes()


@dataclass(frozen=True, slots=True)
class PooledRow:
    """A row of a step whose tokens count for a vector. `ends`: the prompt is computed with this step."""

    row: int
    vector: PooledVector
    counts: bool
    ends: bool


@dataclass(slots=True)
class StepExtras:
    """Of one step, by index of its tokens."""

    tapped: list[np.ndarray] = field(default_factory=list)
    pooled: list[PooledRow] = field(default_factory=list)
    pooled_tokens: list[tuple[int, int, int]] = field(default_factory=list)  # row, first token, end
    embedded: list[tuple[int, np.ndarray]] = field(default_factory=list)  # first token, rows of the buffer
    turned: list[tuple[int, np.ndarray]] = field(default_factory=list)  # first token, positions by axis
    seconds: list[tuple[int, int]] = field(default_factory=list)  # first token of a pair's second text, end

    @property
    def features(self) -> tuple[str, ...]:
        asked = {
            TAPS: self.tapped, POOLED: self.pooled_tokens, EMBEDDINGS: self.embedded, MROPE: self.turned,
            SEGMENTS: self.seconds,
        }  # fmt: skip
        return tuple(name for name, wanted in asked.items() if wanted)

    @property
    def num_tapped(self) -> int:
        return sum(map(len, self.tapped))

    def fill(self, views: Views, num_rows: int) -> None:
        """The step's arrays of these features. `num_rows`: ShapeKey.num_reqs."""
        if self.tapped:
            views["tap_tokens"].fill(0)
            views["tap_tokens"][: self.num_tapped] = np.concatenate(self.tapped)
        if self.pooled_tokens:
            views["pool_rows"].fill(num_rows)
            for row, first, end in self.pooled_tokens:
                views["pool_rows"][first:end] = row
        if self.embedded:
            views["embedding_rows"].fill(-1)
            for first, rows in self.embedded:
                views["embedding_rows"][first : first + len(rows)] = rows
        if self.turned:
            views["rope_positions"][:] = views["positions"]
            for first, positions in self.turned:
                views["rope_positions"][:, first : first + positions.shape[1]] = positions
        if self.seconds:
            views["segments"].fill(0)
            for first, end in self.seconds:
                views["segments"][first:end] = 1


@dataclass(slots=True)
class _Row:
    num_prompt: int
    tap_from: int
    vector: PooledVector | None
    spans: tuple[tuple[int, int], ...]  # (start, length) of the tokens with embeddings
    buffer_rows: np.ndarray  # int32, in the order of the spans' tokens
    positions: np.ndarray | None  # [NUM_AXES, num_prompt]
    second_from: int | None


class RowExtras:
    """Hands out the rows of the buffer of embeddings. The scheduler sees to it that there are enough."""

    def __init__(self, limits: StepLimits) -> None:
        self._rows: dict[int, _Row] = {}
        self._free = list(range(limits.max_embeddings))

    def __bool__(self) -> bool:
        return bool(self._rows)

    def leave(self, slots: Sequence[int]) -> None:
        for slot in slots:
            row = self._rows.pop(slot, None)
            if row is not None:
                self._free += row.buffer_rows.tolist()

    def enter(self, row: NewRow) -> EmbeddingRows | None:
        """Takes in a row that has extras; what it writes into the buffer of embeddings."""
        self.leave([row.slot])
        extras = row.extras
        if extras is None:
            return None
        count = extras.num_embedded
        assert count <= len(self._free), f"{count} rows of embeddings are wanted, and {len(self._free)} are free"
        taken, self._free = self._free[:count], self._free[count:]
        buffer_rows = np.asarray(taken, dtype=np.int32)
        self._rows[row.slot] = _Row(
            row.num_prompt,
            extras.tap_from,
            None if extras.pooling is None else PooledVector(extras.pooling, row.num_prompt),
            extras.embedded,
            buffer_rows,
            np.frombuffer(extras.positions, dtype=np.int32).reshape(NUM_AXES, -1) if extras.positions else None,
            extras.second_from,
        )
        if not count:
            return None
        return EmbeddingRows(
            rows=buffer_rows, values=np.frombuffer(extras.embeddings, dtype=np.float32).reshape(count, -1)
        )

    def step(self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> StepExtras | None:
        """What the rows of a step have of it; None: nothing."""
        found, first = StepExtras(), 0
        for index, (slot, start, count) in enumerate(
            zip(slots.tolist(), starts.tolist(), counts.tolist(), strict=True)
        ):
            row = self._rows.get(slot)
            if row is not None:
                _collect(found, row, index, first, start, count)
            first += count
        return found if found.features or found.pooled else None


def _collect(found: StepExtras, row: _Row, index: int, first: int, start: int, count: int) -> None:
    """The row's tokens from `start` on are the step's from `first` on."""
    end, shift = start + count, first - start  # of a token in the step against its position
    if row.tap_from != NO_TAPS and row.tap_from < end:
        found.tapped.append(np.arange(max(start, row.tap_from) + shift, end + shift, dtype=np.int32))
    if row.vector is not None:
        wanted, behind = row.vector.pooling.tokens(row.num_prompt)
        wanted, behind = max(start, wanted), min(end, behind)
        if wanted < behind:
            found.pooled_tokens.append((index, wanted + shift, behind + shift))
        found.pooled.append(PooledRow(index, row.vector, wanted < behind, end >= row.num_prompt))
    before = 0
    for at, length in row.spans:
        left, right = max(start, at), min(end, at + length)
        if left < right:
            rows = row.buffer_rows[before + left - at : before + right - at]
            found.embedded.append((left + shift, rows))
        before += length
    if row.positions is not None:
        found.turned.append((first, _turned(row.positions, start, end)))
    if row.second_from is not None and row.second_from < end:
        found.seconds.append((max(start, row.second_from) + shift, end + shift))


def _turned(positions: np.ndarray, start: int, end: int) -> np.ndarray:
    """[NUM_AXES, end - start]: behind the prompt all axes count on from its largest position."""
    num_prompt = positions.shape[1]
    known = positions[:, start:end]
    if end <= num_prompt:
        return known
    behind = np.arange(max(start, num_prompt), end, dtype=np.int32) - num_prompt + positions.max() + 1
    return np.concatenate((known, np.broadcast_to(behind, (len(positions), len(behind)))), axis=1)
