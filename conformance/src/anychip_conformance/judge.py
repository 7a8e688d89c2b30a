"""The judge: keeps one judged process, asks it case by case, and goes on when it dies or falls silent."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

import msgspec

from anychip.config import EngineConfig
from anychip.errors import DeviceUnavailable
from anychip.plugin_api import Placement, PlatformManifest
from anychip_conformance.case import Case
from anychip_conformance.facts import Facts
from anychip_conformance.judged import Answer, Opening, Task
from anychip_conformance.verdicts import Outcome, Verdict

_OPEN_DEADLINE_S = 180.0
_CLOSE_S = 10.0
_TAIL = 2000


class Silent(Exception):
    """The judged process ended, or did not answer in time."""


class Judge:
    """Runs cases on one device, each within its deadline times `deadline_scale`."""

    def __init__(self, manifest: PlatformManifest, options: Mapping[str, str], *, deadline_scale: float = 1.0) -> None:
        self._manifest = manifest
        self._options = dict(options)
        self._scale = deadline_scale
        self._process: JudgedProcess | None = None
        self._unopened: Outcome | None = None
        self.facts: Facts | None = None
        """What the device says of itself, once it was opened."""

    def run(self, case: Case, *, seed: int | None = None, params: str | None = None) -> Outcome:
        start = time.perf_counter()
        if self._process is None and self._unopened is None:
            self._open()
        if self._process is None or (self._unopened is not None and case.kind.needs_device):
            assert self._unopened is not None
            return msgspec.structs.replace(self._unopened, case=case.id)
        try:
            return self._process.ask(Task(case=case.id, seed=seed, params=params), case.kind.deadline_s * self._scale)
        except Silent as silence:
            self.close(wait_s=0.0)
            seconds = time.perf_counter() - start
            return Outcome(case=case.id, verdict=Verdict.CRASH, message=str(silence), seconds=seconds)

    def _open(self) -> None:
        """A device that does not open would not open for the next case either: that is remembered."""
        self._process = JudgedProcess(self._manifest, self._options)
        try:
            self.facts = self._process.open(_OPEN_DEADLINE_S * self._scale)
        except (Silent, DeviceUnavailable) as error:
            silent = isinstance(error, Silent)
            verdict = Verdict.CRASH if silent else Verdict.FAIL
            self._unopened = Outcome(case="", verdict=verdict, message=f"the device does not open: {error}")
            if silent:
                self.close(wait_s=0.0)

    def close(self, *, wait_s: float = _CLOSE_S) -> None:
        if self._process is not None:
            self._process.close(wait_s=wait_s)
            self._process = None


class JudgedProcess:
    """A session of its own, so that its ranks end with it."""

    def __init__(self, manifest: PlatformManifest, options: Mapping[str, str]) -> None:
        self._opening = Opening(device=manifest.name, options=dict(options))
        config = EngineConfig(device=manifest.name, device_options=dict(options))
        placement = Placement(rank=0, world_size=1, device_indexes=(0,))
        environment = {**os.environ, **manifest.worker_env(config, placement)}
        # Judges that run side by side share the host's cores.
        share = (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, share)))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        readable, writable = os.pipe()
        self._answers = readable
        self._buffer = b""
        self._child = subprocess.Popen(
            [sys.executable, "-m", "anychip_conformance.judged", str(writable)],
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            pass_fds=(writable,),
            env=environment,
            start_new_session=True,
        )
        os.close(writable)

    def open(self, deadline_s: float) -> Facts:
        """Raises DeviceUnavailable with what the plugin raised."""
        self._write(self._opening)
        answer = self._read(deadline_s)
        if answer.fatal:
            raise DeviceUnavailable(f"opening {self._opening.device} failed: {answer.fatal}")
        assert answer.facts is not None
        return answer.facts

    def ask(self, task: Task, deadline_s: float) -> Outcome:
        self._write(task)
        outcome = self._read(deadline_s).outcome
        assert outcome is not None
        return outcome

    def _write(self, line: msgspec.Struct) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(msgspec.json.encode(line) + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise Silent(self._ending()) from None

    def _read(self, deadline_s: float) -> Answer:
        limit = time.monotonic() + deadline_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, limit - time.monotonic()))
            if not ready:
                raise Silent(f"no answer within {deadline_s:g} s{self._tail()}")
            received = os.read(self._answers, 1 << 20)
            if not received:
                raise Silent(self._ending())
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return msgspec.json.decode(line, type=Answer)

    def _ending(self) -> str:
        try:
            status = self._child.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            return f"the process closed its answers and runs on{self._tail()}"
        cause = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"the process ended with {cause}{self._tail()}"

    def _tail(self) -> str:
        end = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, end - _TAIL))
        text = self._errors.read().decode(errors="replace").strip()
        return f"; it last wrote: {text}" if text else ""

    def close(self, *, wait_s: float = _CLOSE_S) -> None:
        """Lets the process end by itself for so long, then ends it and its ranks."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(wait_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        os.close(self._answers)
        self._errors.close()
