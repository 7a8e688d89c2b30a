"""What a graph keeps of its attention calls: task groups, whose arguments are set again before each replay.

Source: `torch_npu/npu/graphs.py`, which does the same for code that does not know of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anychip.plugin_api import Recorder
from anychip_ascend.attention_call import FusedCall
from anychip_ascend.runtime import device_module, without_ownership


@dataclass(slots=True)
class Task:
    """One attention call within a graph, and what its update needs."""

    call: FusedCall
    handle: Any
    event: Any
    workspace: Tensor
    out: Tensor
    lse: Tensor


@dataclass(slots=True)
class Scratch:
    """One workspace for all calls of all graphs: they run one by one. It grows; who has a smaller one keeps that."""

    held: Tensor | None = None

    def at_least(self, wanted: Tensor) -> Tensor:
        if self.held is None or self.held.nbytes < wanted.nbytes:
            self.held = wanted
        return self.held


@dataclass(slots=True)
class Recording:
    """What a capture has met so far."""

    scratch: Scratch
    tasks: list[Task] = field(default_factory=list)

    def attend(self, call: FusedCall, recorder: Recorder, group: int) -> Tensor:
        """Records a call as a task group whose lengths `recorder` renews from the plan of KV group `group`."""
        npu = device_module()
        stream = npu.current_stream()
        event = npu.ExternalEvent()
        event.wait(stream)
        event.reset(stream)
        workspace, out = self.scratch.at_least(call.max_workspace()), torch.empty_like(call.query)
        lse = torch.empty(0, dtype=torch.float32, device=out.device)
        npu.graph_task_group_begin(stream)
        try:
            call.run_into(workspace, out, lse)
        finally:  # an open group would hide what went wrong
            handle = npu.graph_task_group_end(stream)
        # The graph's pool keeps their memory, for this call and, later in the step, for others.
        call.query = without_ownership(call.query)
        self.tasks.append(Task(call, handle, event, workspace, without_ownership(out), lse))

        def renew(plan: Any) -> None:
            call.query_ends, call.key_lengths = plan.query_ends, plan.key_lengths

        recorder.on_replay(group, renew)
        return out
