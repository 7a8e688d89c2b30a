"""Ranks as threads of this process: the worker process's own loop around a real worker, and gloo between them. Costs no
start of processes, so that many engines of several ranks fit into a run of the tests."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from anychip.launch.worker_main import WorkerProcess
from anychip.process_specs import WorkerSpec
from anychip_cpu import native

native.load("")
"""Here, not in each thread: an extension that another thread is importing seems not to be there."""


class RankThread:
    """launch.child.Child of a thread."""

    pid = 0
    """Nobody may signal it."""

    def __init__(self, module: str, spec: WorkerSpec, extra_env: Mapping[str, str] | None = None) -> None:
        self._code: int | None = None
        self._process = WorkerProcess(spec)
        self._thread = threading.Thread(target=self._run, name=f"rank-{spec.rank}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._code = self._process.run()

    def exit_code(self) -> int | None:
        return self._code

    def show_stack(self) -> None: ...

    def kill(self) -> None: ...

    def stop(self, deadline_s: float) -> None:
        self._thread.join(deadline_s)
