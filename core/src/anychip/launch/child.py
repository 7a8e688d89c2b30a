"""Child processes: started without pickle, gone when their parent is.

A child reads its spec as one line of standard input. The pipe stays open: when it closes, the parent is gone, and
the child ends itself however busy its main thread is.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping

import msgspec

from anychip.environment import child_environment

log = logging.getLogger("anychip.engine")

_STACKS = signal.SIGUSR2
"""Asks a child for the stacks of its threads."""

_TERMINATE_S = 2.0
_KILL_S = 5.0
"""A process that the kernel cannot end, inside a driver say, must not hold up its parent."""


class Child:
    """`python -m module`, given `spec` on standard input as one line of JSON; environments as
    environment.child_environment has them. Raises OSError."""

    def __init__(
        self,
        module: str,
        spec: msgspec.Struct,
        extra_env: Mapping[str, str] | None = None,
        unset_env: Mapping[str, str] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            env=child_environment(extra_env or {}, unset_env),
            start_new_session=True,  # Ctrl-C reaches the supervisor alone, which stops its children in order
        )
        self.pid = self._process.pid
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone already, which its exit status will say
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

    def show_stack(self) -> None:
        """Asks for the stacks of its threads, which it writes to the log by itself, if it can."""
        if self.exit_code() is None:
            show_stack(self.pid)

    def kill(self) -> None:
        """Ends the child at once."""
        self._process.kill()

    def stop(self, deadline_s: float) -> None:
        """Waits for the child to end by itself, then ends it."""
        if self.wait(deadline_s) is None:
            self._process.terminate()
            if self.wait(_TERMINATE_S) is None:
                self._process.kill()
                if self.wait(_KILL_S) is None:
                    log.error("process %d does not end; it holds what it held", self.pid)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()


def show_stack(pid: int) -> None:
    """Asks a child, or a child's child, for the stacks of its threads."""
    log.error("stacks of process %d:", pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, _STACKS)
        os.kill(pid, signal.SIGCONT)  # a stopped process would write nothing


def runs(pid: int) -> bool:
    """Whether a child's child is there. Children lead sessions of their own: a process that has got its number since
    hardly does."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        return os.getsid(pid) == pid
    return False


def kill_leftover(pid: int) -> None:
    """Ends a child's child, if it is there."""
    if runs(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def show_stacks_when_asked() -> None:
    """In the child: from now on, it writes the stacks of its threads to standard error when it is asked, whatever its
    threads do."""
    faulthandler.register(_STACKS, all_threads=True)


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
