"""Draws from captured steps' logits, captured as well where the platform wants that."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from anychip.ops.reference import Drawn
from anychip.plugin_api import DRAFTS, GraphCapture, SamplingInputs, Unsupported
from anychip.worker.captured import CapturedDraw, CapturedStep

if TYPE_CHECKING:
    from anychip.worker.torch_state import TorchHidden, TorchState

Draw = Callable[["TorchState", "TorchHidden", SamplingInputs], Drawn]
"""Draws for all samples of a step's shape, padding included."""


class CapturedDraws:
    """Plain draws and those with drafts, greedy or not, of each captured step: what edits, masks or reports logits runs
    eagerly."""

    def __init__(self, graphs: GraphCapture, draw: Draw) -> None:
        self._graphs = graphs
        self._draw = draw

    def __call__(self, state: TorchState, hidden: TorchHidden, late: SamplingInputs) -> dict[str, Tensor] | None:
        """By field of HostOutputs; None: they are not captured."""
        step, features = hidden.step, late.key.features
        if step is None or late.staged_at is None or not self._graphs.draws or features not in ((), (DRAFTS,)):
            return None
        shape = features, late.all_greedy
        if shape not in step.draw_graphs:
            step.draw_graphs[shape] = self._captured(state, hidden, late)
        captured = step.draw_graphs[shape]
        if captured is None:
            return None
        drawn: Drawn = self._graphs.run(captured.handle, captured.plans)
        state.last_ids.copy_(drawn.last_ids)
        # The next step's draws are written to the same storage, and a result may be fetched after that.
        return {name: value[: late.num_samples].clone() for name, value in drawn.outputs().items()}

    def _captured(self, state: TorchState, hidden: TorchHidden, late: SamplingInputs) -> CapturedDraw | None:
        step: CapturedStep | None = hidden.step
        assert step is not None
        try:
            handle = self._graphs.capture(lambda: self._draw(state, hidden, late), late.key)
        except Unsupported:
            return None
        return CapturedDraw(handle, step.plans)
