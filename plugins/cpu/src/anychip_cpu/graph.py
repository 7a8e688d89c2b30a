"""Steps as lists of kernel calls, which one native call makes again: whole ones, and the pieces between what runs anew.

The reason is what Python costs between kernels. A launch costs a function call here too, and a small model's step has
hundreds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from anychip.plugin_api import (
    Communicator,
    GraphCapture,
    GraphLevel,
    PlannedCall,
    Recorder,
    RunOutsideGraph,
    ShapeKey,
    Unsupported,
)
from anychip_cpu.arena import Arena
from anychip_cpu.native import Kernels
from anychip_cpu.recording import Piece, Recording, Unrecordable

_RESERVED = 4 << 20
"""Bytes that a recording is expected to take, its share of the arena among them."""


class Recordings:
    """`current` lists what is called now; None: nothing is recorded."""

    def __init__(self) -> None:
        self.current: Recording | None = None


@dataclass(slots=True)
class RecordedStep:
    pieces: Sequence[Piece]
    output: Any
    num_tokens: int
    """That it was recorded for."""
    held: tuple[object, ...]
    """Keeps what the calls' arguments point to alive."""


class CpuGraphs(GraphCapture):
    """Nothing is computed while a step is recorded, so that a shape's first step takes no longer than one without
    recording. One recording serves every step with as many tokens or fewer."""

    level = GraphLevel.FULL
    lazy = True
    draws = True
    collectives = False

    def __init__(self, kernels: Kernels, recordings: Recordings) -> None:
        self._kernels = kernels
        self._recordings = recordings
        self._arena = Arena()

    def reserve(self, keys: Sequence[ShapeKey], pieces: Sequence[int] = ()) -> int:
        return _RESERVED * (len(keys) + len(pieces))

    def capture(
        self,
        fn: Callable[[], Any],
        key: ShapeKey,
        *,
        recorder: Recorder | None = None,
        communicators: Sequence[Communicator] = (),
    ) -> RecordedStep:
        return self._recorded(lambda recording: fn(), fn, key.num_tokens, communicators, whole=False)

    def run(self, handle: RecordedStep, plans: Sequence[Any]) -> Any:
        num_tokens = plans[0].num_tokens if plans else handle.num_tokens
        for piece in handle.pieces:
            piece(plans, num_tokens)
        return handle.output

    def capture_pieces(
        self,
        fn: Callable[[RunOutsideGraph], Any],
        plans: Sequence[Any],
        num_tokens: int,
        *,
        communicators: Sequence[Communicator] = (),
    ) -> RecordedStep:
        def step(recording: Recording) -> Any:
            def run_outside_graph(call: PlannedCall) -> Tensor:
                return recording.between(call, plans)

            return fn(run_outside_graph)

        return self._recorded(step, fn, num_tokens, communicators, whole=True)

    def run_pieces(self, handle: RecordedStep, plans: Sequence[Any]) -> Any:
        return self.run(handle, plans)

    def _recorded(
        self,
        step: Callable[[Recording], Any],
        fn: object,
        num_tokens: int,
        communicators: Sequence[Communicator],
        *,
        whole: bool,
    ) -> RecordedStep:
        if any(communicator.size > 1 for communicator in communicators):
            raise Unsupported("recorded steps", ["ranks exchange values between kernels"])
        recording = Recording(self._kernels, self._arena, num_tokens, whole=whole)
        self._recordings.current = recording
        try:
            with recording:
                output = step(recording)
        except (Unrecordable, NotImplementedError) as error:
            raise Unsupported("recorded steps", [str(error)]) from error
        finally:
            self._recordings.current = None
        return RecordedStep(recording.pieces, output, num_tokens, (recording, fn))
