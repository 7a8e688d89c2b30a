"""A folder of files within a limit: room is made and taken before a file is written, and the least used go first.

Processes share the folder. Who makes room holds a lock, and takes the room at once, as a file of the full size that
others count; it gets its name when it is whole. A file that is removed stays whole for those who have mapped it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: files are written without a lock, and the limit may be passed by one of them
    fcntl = None  # type: ignore[assignment]

_SUFFIX, _UNFINISHED = ".weights", ".part"
_LEFT_FREE = 0.05
"""Of the file system: what a cache never fills."""
_ABANDONED_S = 3600.0


class NoRoom(OSError):
    """A file cannot be written within the bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFolder:
    """`limit` bytes in all. `private`: the folder must be this user's own, as what others write is not trusted."""

    path: Path
    limit: int
    private: bool = False

    def file(self, name: str) -> Path:
        return self.path / f"{name}{_SUFFIX}"

    def check(self) -> None:
        """Raises PermissionError where the folder is another user's."""
        if self.private and self.path.exists() and (owner := self.path.stat().st_uid) != os.getuid():
            raise PermissionError(errno.EPERM, f"it belongs to user {owner}, not to {os.getuid()}", str(self.path))

    def used(self, file: Path) -> None:
        """Just now: it goes last. A file that may not be marked is none the worse."""
        with contextlib.suppress(OSError):
            os.utime(file)

    @contextlib.contextmanager
    def writing(self, name: str, nbytes: int) -> Iterator[IO[bytes]]:
        """A file with room for nbytes, which others see once it is whole. Raises NoRoom, or another OSError."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.check()
        with self._locked():
            self._make_room(nbytes, replacing=self.file(name))
            file = tempfile.NamedTemporaryFile(dir=self.path, suffix=_UNFINISHED, delete=False)  # noqa: SIM115
            try:
                _take_room(file.fileno(), nbytes)
            except BaseException:
                _discard(file)
                raise
        try:
            yield file
            file.flush()
            os.replace(file.name, self.file(name))
        except BaseException:
            _discard(file)
            raise
        file.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.path / ".lock").open("a") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the system opens it when its holder ends
            yield

    def _make_room(self, nbytes: int, replacing: Path) -> None:
        if nbytes > self.limit:
            raise NoRoom(f"{_gib(nbytes)} are more than the limit of {_gib(self.limit)}")
        files = {path: path.stat() for path in self.path.iterdir() if path.suffix in (_SUFFIX, _UNFINISHED)}
        abandoned = time.time() - _ABANDONED_S
        for path, status in list(files.items()):
            if path.suffix == _UNFINISHED and status.st_mtime < abandoned:
                _remove(path, files)
        oldest = sorted((path for path in files if path.suffix == _SUFFIX), key=lambda path: files[path].st_mtime)
        disk = shutil.disk_usage(self.path)
        free = disk.free - int(disk.total * _LEFT_FREE)
        # The old file of the same name goes last: it is kept until the new one takes its place.
        for path in [path for path in oldest if path != replacing]:
            held = sum(status.st_size for status in files.values())
            if held + nbytes <= self.limit and nbytes <= free:
                return
            free += files[path].st_size
            _remove(path, files)
        held = sum(status.st_size for status in files.values())
        if replacing in files and (held + nbytes > self.limit or nbytes > free):
            held, free = held - files[replacing].st_size, free + files[replacing].st_size
            _remove(replacing, files)
        if held + nbytes > self.limit:
            raise NoRoom(f"other processes are writing {_gib(held)}, and the limit is {_gib(self.limit)}")
        if nbytes > free:
            raise NoRoom(f"{_gib(nbytes)} would leave less than {_LEFT_FREE:.0%} of the file system free")


def _remove(path: Path, files: dict[Path, os.stat_result]) -> None:
    path.unlink(missing_ok=True)
    del files[path]


def _discard(file: IO[bytes]) -> None:
    file.close()
    with contextlib.suppress(OSError):
        os.unlink(file.name)


def _take_room(fd: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, nbytes)  # a file system that takes no room ahead: a full disk shows later


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
