"""Child processes: started without pickle, gone when their parent is.

A child reads its spec as one line of standard input. The pipe stays open: when it closes, the parent is gone, and
the child ends itself however busy its main thread is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping

import msgspec

from anychip.config import EngineSpec, WorkerSpec, child_environment


class Child:
    """`python -m module`, given `spec` on standard input as one line of JSON."""

    def __init__(self, module: str, spec: EngineSpec | WorkerSpec, extra_env: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            env=child_environment(dict(extra_env or {})),
            start_new_session=True,  # Ctrl-C reaches the supervisor alone, which stops its children in order
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(spec) + b"\n")
        self._process.stdin.flush()

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        """The exit status, or None after the timeout."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def kill(self) -> None:
        """Ends the child at once."""
        self._process.kill()

    def stop(self, deadline_s: float) -> None:
        """Waits for the child to end by itself, then ends it."""
        if self.wait(deadline_s) is None:
            self._process.terminate()
            if self.wait(2.0) is None:
                self._process.kill()
                self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()


def read_spec() -> bytes:
    """In the child: the spec."""
    return sys.stdin.buffer.readline()


def end_with_parent(folder: str) -> None:
    """In the child: from now on, the process ends when its parent does, and removes the folder of their sockets,
    which a killed parent could not."""
    threading.Thread(target=_watch_parent, args=(folder,), name="parent-watch", daemon=True).start()


def _watch_parent(folder: str) -> None:
    # os.read, not the buffered reader: a daemon thread inside the buffer's lock would abort the interpreter's end.
    while os.read(0, 4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)
