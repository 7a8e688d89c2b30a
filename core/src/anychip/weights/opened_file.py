"""Reads files without mapping them: a mapped page counts as resident memory beside its copy."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from anychip.errors import CheckpointError

_AHEAD_BYTES = 256 << 20
_AHEAD_STEP = 4 << 20


class OpenedFile:
    """An open file of `size` bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._fd).st_size
        self._ahead = ReadAhead(self._fd, self.size)

    def peek(self, count: int, offset: int = 0) -> bytes:
        """So many bytes from `offset`, fewer where the file ends before."""
        return os.pread(self._fd, count, offset)

    def read_ahead(self) -> None:
        """Lets the disk work ahead of read_into, which is then to be called in the order of the bytes."""
        self._ahead.start()

    def pieces(self, offset: int, nbytes: int) -> Iterator[bytearray]:
        """The file's bytes from `offset`, a few at a time."""
        for start in range(offset, offset + nbytes, _AHEAD_STEP):
            piece = bytearray(min(_AHEAD_STEP, offset + nbytes - start))
            self._fill(memoryview(piece), start)
            yield piece

    def read_into(self, target: Tensor, offset: int) -> None:
        """Fills a contiguous host tensor with the file's bytes from `offset`."""
        self._ahead.reached(offset)
        self._fill(memoryview(target.view(torch.uint8).numpy().data), offset)

    def _fill(self, buffer: memoryview, offset: int) -> None:
        while len(buffer):
            count = os.preadv(self._fd, [buffer], offset)
            if count == 0:
                raise CheckpointError(f"{self.path} became shorter while it was read")
            buffer, offset = buffer[count:], offset + count

    def close(self) -> None:
        self._ahead.stop()
        os.close(self._fd)


class ReadAhead:
    """Reads a file into the page cache a little ahead of who uses it, so that the disk works while weights are
    copied. What is cached already is passed over."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd, self._size = fd, size
        self._moved = threading.Condition()
        self._reached = 0
        self._stopped = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def reached(self, offset: int) -> None:
        """The user is here."""
        with self._moved:
            self._reached = max(self._reached, offset)
            self._moved.notify()

    def stop(self) -> None:
        with self._moved:
            self._stopped = True
            self._moved.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        scrap = memoryview(bytearray(_AHEAD_STEP))
        for position in range(0, self._size, _AHEAD_STEP):
            if not self._wait_for_turn(position):
                return
            if position + _AHEAD_STEP > self._reached and not self._is_cached(position + _AHEAD_STEP - 1):
                os.preadv(self._fd, [scrap], position)

    def _wait_for_turn(self, position: int) -> bool:
        with self._moved:
            self._moved.wait_for(lambda: self._stopped or position < self._reached + _AHEAD_BYTES)
            return not self._stopped

    def _is_cached(self, offset: int) -> bool:
        try:
            return os.preadv(self._fd, [bytearray(1)], min(offset, self._size - 1), os.RWF_NOWAIT) == 1
        except OSError:  # not cached, or a file system that cannot say
            return False
