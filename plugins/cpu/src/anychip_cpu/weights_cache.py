"""Packed weights on disk, so that a second start maps them instead of packing the checkpoint again.

A file is a line of JSON, which says what it holds and how it was made, and then each storage from a page's boundary
on. It is mapped privately over the memory that was allocated for the weights: pages are shared with other processes
and with the system's cache until somebody writes to one. Only bytes are read from it, never code; and a file that
another version, machine or checkpoint made is passed over with one line, and written anew.
"""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import UntypedStorage

from anychip.plugin_api import API_VERSION, Unsupported, WeightsKey
from anychip_cpu.cache_folder import CacheFolder
from anychip_cpu.memory import HUGE_PAGE
from anychip_cpu.packing import round_up

_log = logging.getLogger("anychip.plugins")

_LAYOUT = 2
"""Raised whenever weights come to lie otherwise."""
_MOST_HEADER = 16 << 20
_PAGE = mmap.PAGESIZE
_FIXED, _POPULATE_READ = 0x10, 22
"""Linux's MAP_FIXED and MADV_POPULATE_READ, which Python's module lacks."""


ON, OFF = "on", "off"
_WORTH_S = 2.0
"""Processor time of a load from the checkpoint: what takes less is not kept by default, as little would be saved."""


def weights_cache(where: str, limit_gib: float, isa: str) -> WeightsCache | None:
    """What the options say: the user's cache folder, none, or a folder. Raises Unsupported for a limit that is none."""
    if not limit_gib > 0:
        why = f"packed_weights_gib={limit_gib:g}: no room at all; give it some, or packed_weights={OFF}"
        raise Unsupported("anychip-cpu", [why])
    if where in ("", OFF):
        return None
    limit = int(limit_gib * 2**30)
    if where != ON:
        return WeightsCache(CacheFolder(path=Path(where).expanduser(), limit=limit), isa)
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        caches = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    except RuntimeError as error:
        _log.warning("packed weights are not kept: %s", error)
        return None
    folder = CacheFolder(path=caches / "anychip" / "packed", limit=limit, private=True)
    return WeightsCache(folder, isa, worth_s=_WORTH_S)


class WeightsCache:
    """The files of a folder. `isa` is the variant of the kernels that pack; `clock` counts processor time."""

    def __init__(
        self, folder: CacheFolder, isa: str, *, worth_s: float = 0.0, clock: Callable[[], float] = time.process_time
    ) -> None:
        self._folder = folder
        self._machine = f"{platform.machine()} {isa}"
        self._worth_s, self._clock = worth_s, clock
        self._began = clock()
        self._closed = False
        """To us, which was said: it is not said again."""

    def restore(self, key: WeightsKey, weights: Sequence[UntypedStorage]) -> bool:
        """Platform.restore_weights."""
        self._began = self._clock()
        path = self._folder.file(key.name)
        try:
            self._folder.check()
            with path.open("rb") as file:
                line = file.readline(_MOST_HEADER)
                offsets = _offsets(len(line), weights)
                why = self._differs(line, key, weights)
                if not why and os.fstat(file.fileno()).st_size != offsets[-1]:
                    why = f"it does not have the {offsets[-1]} bytes that it should"
                if not why:
                    for storage, offset in zip(weights, offsets, strict=False):
                        _fill(storage, file.fileno(), offset)
                    self._folder.used(path)
                    return True
        except FileNotFoundError:
            return False
        except OSError as error:
            why = str(error)
            self._closed = isinstance(error, PermissionError)
        _log.warning("packed weights in %s are ignored: %s", path, why)
        return False

    def keep(self, key: WeightsKey, weights: Sequence[UntypedStorage]) -> None:
        """Platform.keep_weights. Others see the file when it is whole."""
        if self._closed or self._clock() - self._began < self._worth_s:
            return
        line = json.dumps(self._made(key, weights)).encode() + b"\n"
        offsets = _offsets(len(line), weights)
        try:
            with self._folder.writing(key.name, offsets[-1]) as file:
                file.write(line)
                for storage, offset in zip(weights, offsets, strict=False):
                    file.seek(offset)
                    file.write(_bytes_of(storage))
                file.truncate(offsets[-1])
        except OSError as error:
            _log.warning("packed weights are not kept in %s: %s", self._folder.path, error)
            return
        _log.info("packed weights are kept in %s", self._folder.file(key.name))

    def _made(self, key: WeightsKey, weights: Sequence[UntypedStorage]) -> dict[str, object]:
        return {
            "version": f"{API_VERSION}, layout {_LAYOUT}",
            "machine": self._machine,
            "checkpoint": key.contents,
            "sizes": [storage.nbytes() for storage in weights],
        }

    def _differs(self, line: bytes, key: WeightsKey, weights: Sequence[UntypedStorage]) -> str:
        """Why a file that begins so does not hold these weights; "" when it does."""
        here = self._made(key, weights)
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.keys() != here.keys():
            return "it is no file of packed weights"
        for name in ("version", "machine"):
            if found[name] != here[name]:
                return f"another {name} made it, {found[name]}; this is {here[name]}"
        return "" if found == here else "the checkpoint, or what is asked of it, has changed since"


def _offsets(header: int, weights: Sequence[UntypedStorage]) -> list[int]:
    """Where each lies behind the header, and where the last one ends."""
    offsets, end = [], header
    for nbytes in (storage.nbytes() for storage in weights):
        offsets.append(round_up(end, HUGE_PAGE if nbytes >= HUGE_PAGE else _PAGE))
        end = offsets[-1] + round_up(nbytes, _PAGE)
    return [*offsets, end]


def _fill(storage: UntypedStorage, fd: int, offset: int) -> None:
    """Whole pages at a page's boundary are mapped, the rest is read."""
    mapped = storage.nbytes() // _PAGE * _PAGE if storage.data_ptr() % _PAGE == 0 else 0
    if mapped:
        _map(storage.data_ptr(), mapped, fd, offset)
    rest, offset = _bytes_of(storage)[mapped:], offset + mapped
    while rest:
        count = os.preadv(fd, [rest], offset)
        if count == 0:
            raise OSError("it became shorter while it was read")
        rest, offset = rest[count:], offset + count


def _map(address: int, nbytes: int, fd: int, offset: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    area = ctypes.c_void_p(address), ctypes.c_size_t(nbytes)
    flags = mmap.MAP_PRIVATE | _FIXED
    where = libc.mmap(*area, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, ctypes.c_longlong(offset))
    if where != address:
        raise OSError(ctypes.get_errno(), "its pages cannot be mapped")
    # To have them now is faster than to be surprised later. A system that does not know the advice has them later.
    libc.madvise(*area, _POPULATE_READ)


def _bytes_of(storage: UntypedStorage) -> memoryview:
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
