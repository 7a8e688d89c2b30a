"""The functions that the C part calls: graphs (cann/graphs.c), events (cann/runtime.c) and collectives (cann/hccl.c).

Each answers an ACL error code; what went wrong is kept for aclGetRecentErrMsg, so that the vendor's own error path
reports it.
"""

from __future__ import annotations

import ctypes
from typing import Any

from anychip_npu_simulator import hccl
from anychip_npu_simulator.errors import GraphRefused, Refused
from anychip_npu_simulator.graphs import Captured, Group, Task, active, add, num_streams_held, replay, state, updating
from anychip_npu_simulator.machine import machine

UNSUPPORTED, NO_STREAMS, INVALIDATED, NOT_UPDATABLE, REFUSED = 207000, 207008, 507903, 207019, 507899
"""ACL error codes (acl/error_codes/rt_error_codes.h); the last is an internal error of the driver."""
_HCCL_PARAMETER, _HCCL_INTERNAL, _HCCL_TIMEOUT = 1, 4, 9
"""HcclResult (hccl_types.h)."""


class Refusal(Exception):
    """An ACL error code and its words, for the runtime's own error path."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code, self.words = code, words


class Hooks:
    """Numbers go out through pointers."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def _number(self) -> int:
        state.next_number += 1
        return state.next_number - 1

    def capture_begin(self, stream: int, out: Any) -> None:
        here = machine()
        if not here.graphs:
            raise Refusal(REFUSED, f"simulated CANN: {here.generation} has no ACL graphs")
        if state.capture is not None:
            raise Refusal(INVALIDATED, "simulated CANN: one capture at a time")
        self._take_stream()
        state.broken = None
        state.capture = Captured(self._number(), streams={stream})
        out[0] = state.capture.number

    def _take_stream(self) -> None:
        limit, held = machine().num_streams, num_streams_held()
        made = self.library.sim_num_streams()
        if held + made + 1 > limit:
            words = f"simulated CANN: no stream resource: {len(state.graphs)} captured graphs hold {held} of {limit}"
            raise Refusal(NO_STREAMS, f"{words} streams, {made} are others; capture fewer sizes")
        self.library.sim_hold_streams(held + 1)

    def capture_end(self, stream: int) -> None:
        graph, state.capture = state.capture, None
        group, state.group = state.group, None
        if graph is None:
            raise Refusal(INVALIDATED, "simulated CANN: no stream is captured")
        if state.broken is not None:
            raise Refusal(INVALIDATED, f"simulated CANN: the capture is invalid: {state.broken}")
        if group is not None:
            raise Refusal(INVALIDATED, "simulated CANN: graph_task_group_end is missing")
        state.graphs[graph.number] = graph

    def execute(self, model: int, stream: int) -> None:
        if state.capture is not None:
            raise Refusal(UNSUPPORTED, "simulated CANN: a replay within a capture")
        replay(model)

    def destroy(self, model: int) -> None:
        graph = state.graphs.pop(model, None)
        for step in graph.steps if graph else []:
            if isinstance(step, Group):
                state.groups.pop(step.number, None)
        self.library.sim_hold_streams(num_streams_held())

    def group_begin(self, stream: int) -> None:
        if state.capture is None or state.group is not None:
            raise Refusal(INVALIDATED, "simulated CANN: graph_task_group_begin outside of a capture, or within a group")
        state.group = Group(self._number())

    def group_end(self, stream: int, out: Any) -> None:
        group, state.group = state.group, None
        if state.capture is None or group is None:
            raise Refusal(INVALIDATED, "simulated CANN: graph_task_group_end without a begin")
        state.capture.steps.append(group)
        state.groups[group.number] = group
        out[0] = group.number

    def update_begin(self, stream: int, number: int) -> None:
        if number not in state.groups:
            raise Refusal(NOT_UPDATABLE, f"simulated CANN: task group {number} is of no graph that is there")
        state.renewed = (state.groups[number], [])

    def update_end(self, stream: int) -> None:
        renewed, state.renewed = state.renewed, None
        if renewed is None:
            raise Refusal(NOT_UPDATABLE, "simulated CANN: graph_task_update_end without a begin")
        group, tasks = renewed
        if len(tasks) != len(group.tasks):
            raise Refusal(NOT_UPDATABLE, f"simulated CANN: {len(group.tasks)} tasks were captured, {len(tasks)} came")
        group.tasks, group.fresh = tasks, True

    def event(self, kind: int, event: int, stream: int) -> None:
        """External events are what a replay waits for; 3 is a stream that joined the capture."""
        if kind == 3:
            if state.capture is not None and stream not in state.capture.streams:
                self._take_stream()
                state.capture.streams.add(stream)
            return
        if not active() or updating():
            state.events[event] = kind == 0
            return
        if kind == 1:
            add(Task("event wait", lambda: _wait(event)))
        else:
            add(Task("event", lambda: state.events.__setitem__(event, kind == 0)))

    def collective(self, what: bytes, send: int, recv: int, numbers: Any, stream: int) -> None:
        try:
            hccl.call(what.decode(), send, recv, list(numbers[:6]))
        except Refused as refused:
            raise Refusal(_HCCL_PARAMETER, f"simulated HCCL: {refused}") from refused
        except RuntimeError as error:  # gloo's
            late = "timed out" in str(error).lower()
            code = _HCCL_TIMEOUT if late else _HCCL_INTERNAL
            raise Refusal(code, f"simulated HCCL: {what.decode()}: {error}") from error


def _wait(event: int) -> None:
    if not state.events.get(event) and not machine().allows_stale:
        allowed = "an event that an update has recorded since the last replay"
        raise GraphRefused("aclmdlRIExecuteAsync", "event", "not recorded: the device would wait for ever", allowed)


_POINTER, _NUMBER, _OUT = ctypes.c_void_p, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64)
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "capture_begin": (_POINTER, _OUT),
    "capture_end": (_POINTER,),
    "execute": (_NUMBER, _POINTER),
    "destroy": (_NUMBER,),
    "group_begin": (_POINTER,),
    "group_end": (_POINTER, _OUT),
    "update_begin": (_POINTER, _NUMBER),
    "update_end": (_POINTER,),
    "event": (ctypes.c_int, _POINTER, _POINTER),
    "collective": (ctypes.c_char_p, _POINTER, _POINTER, ctypes.POINTER(_NUMBER), _POINTER),
}
"""Of struct hooks in cann/simulator.h, in its order."""


def install(library: ctypes.CDLL) -> Any:
    """Hands the hooks to the library; what is returned must live as long as the process calls it."""
    library.sim_refuse.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p)
    hooks = Hooks(library)

    def guarded(name: str) -> Any:
        function = getattr(hooks, name)

        def call(*arguments: Any) -> int:
            try:
                function(*arguments)
            except Refusal as refusal:
                library.sim_refuse(refusal.code, b"%s", refusal.words.encode())
                return refusal.code
            except Refused as refused:
                library.sim_refuse(REFUSED, b"%s", str(refused).encode())
                return REFUSED
            except Exception as error:  # noqa: BLE001 C is the caller, and reports it
                library.sim_refuse(REFUSED, b"%s", f"{type(error).__name__}: {error}".encode())
                return REFUSED
            return 0

        return call

    kinds = {name: ctypes.CFUNCTYPE(ctypes.c_int, *signature) for name, signature in SIGNATURES.items()}
    struct = type("Functions", (ctypes.Structure,), {"_fields_": list(kinds.items())})
    functions = struct(*(kind(guarded(name)) for name, kind in kinds.items()))
    library.sim_set_hooks(ctypes.byref(functions))
    return functions
