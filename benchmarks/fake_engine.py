"""An engine process without a model, for measurements of the API process: every open request gets a token each so many
milliseconds, as if one device served them all.

python benchmarks/fake_engine.py FOLDER STEP_MS
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from anychip.engine.engine_loop import EngineLoop
from anychip.engine.ipc import to_engine_decoder
from anychip.engine_stats import EngineStats
from anychip.executor.progress import Progress
from anychip.messages import Abort, AddRequest, EngineReady, Outputs, SequenceDelta, Shutdown
from anychip.process_specs import EngineSpec
from anychip.worker_report import DeviceRules, KVCacheConfig, MemoryPlan, WorkerReady

MAX_MODEL_LEN = 200_000
WORDS = range(1000, 1400)
"""Token ids that are answered, in turn."""


class FakeChild:
    """launch.child.Child, with this engine in the place of the real one."""

    step_ms = 10.0

    def __init__(self, module: str, spec: EngineSpec) -> None:
        self._process = subprocess.Popen([sys.executable, __file__, spec.folder, str(self.step_ms)])
        self.pid = self._process.pid

    def show_stack(self) -> None:
        """This engine's stacks interest nobody."""

    def exit_code(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        self._process.kill()

    def stop(self, deadline_s: float) -> None:
        try:
            self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(folder: Path, step_s: float) -> None:
    """Until Shutdown."""
    progress = Progress()
    loop = EngineLoop(folder, progress)
    kv, memory = KVCacheConfig(1000, ()), MemoryPlan(0, 0, 0, 0, 1000, 16_000, 1.0)
    loop.send(EngineReady(WorkerReady(kv, DeviceRules(), memory, "fake:0"), MAX_MODEL_LEN))
    progress.started()
    left: dict[str, int] = {}
    due = time.perf_counter()
    for step in range(sys.maxsize):
        progress.turned()
        due = max(due + step_s, time.perf_counter())
        while (wait := due - time.perf_counter()) > 0 or not left:
            if not loop._requests.poll(max(0, int(1000 * wait)) if left else 500):
                continue
            message = to_engine_decoder.decode(loop._requests.recv())
            if isinstance(message, AddRequest):
                left[message.request_id] = message.max_output
            elif isinstance(message, Abort):
                left.pop(message.request_id, None)
            elif isinstance(message, Shutdown):
                loop.close()
                return
        token, now, deltas = WORDS[step % len(WORDS)], time.perf_counter(), []
        for request_id in left:
            left[request_id] -= 1
            end = None if left[request_id] else "length"
            deltas.append(SequenceDelta(request_id, 0, [token], finish_reason=end, queued_s=now))
        left = {request_id: more for request_id, more in left.items() if more}
        loop.send(Outputs(deltas, EngineStats(len(left), 0, 0, 1, 1000, step, 0, 0, 0)))


if __name__ == "__main__":
    serve(Path(sys.argv[1]), float(sys.argv[2]) / 1e3)
