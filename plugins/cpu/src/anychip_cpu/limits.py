"""How many threads this process may run: by its affinity, its cpuset, and the quota of its control groups.

A quota is processor time for each period. Threads beyond it do not make work faster: all of them are stopped for the
rest of each period once it is used up. So the default is the quota rounded down, which leaves the fraction to Python's
own threads; a number that is asked for may be the quota rounded up.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger("anychip.plugins")

_EVERY_S = 3.0
"""Seconds between two readings of limits: they change when an operator changes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuLimit:
    """`threads` are the default and `most` what may be asked for; `why` names the limit that applied, if one did."""

    threads: int
    most: int
    why: str
    limited: bool = True

    def __str__(self) -> str:
        return f"{self.threads} thread{'s' if self.threads > 1 else ''}: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """Processors' worth of time, and the file that says so."""

    cpus: float
    file: Path


def cpu_limit(*, ranks: int = 1, root: Path = Path("/")) -> CpuLimit:
    """What applies now. `ranks` processes share the quota; each has an affinity of its own. `root` holds proc and sys:
    a test has others."""
    cores = allowed_cores()
    quota = cpu_quota(root)
    if quota is not None and quota.cpus / ranks < len(cores):
        mine = quota.cpus / ranks
        below = ", below one core" if mine < 1 else ""
        shared = f" for {ranks} ranks" if ranks > 1 else ""
        why = f"a quota of {quota.cpus:g} CPUs{shared}{below} ({quota.file})"
        return CpuLimit(threads=max(1, math.floor(mine)), most=max(1, math.ceil(mine)), why=why)
    count, total = len(cores), os.cpu_count() or len(cores)
    if count == total:
        why = f"all {total} cores" if total > 1 else "one core is here"
    else:
        file = next((file for file, listed in _cpusets(root) if listed == cores), None)
        why = f"{count} of {total} cores by " + (f"the cpuset {file}" if file else "this process's affinity")
    return CpuLimit(threads=count, most=count, why=why, limited=count < total)


def allowed_cores() -> set[int]:
    """By affinity, within the cpuset."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/")) -> Quota | None:
    """The least of this process's control groups and those above them, of either version; None without any."""
    found = [quota for folder in control_groups("cpu", root) for quota in _quota_of(folder)]
    return min(found, key=lambda quota: quota.cpus, default=None)


def _quota_of(folder: Path) -> Iterator[Quota]:
    for file, period_file in (("cpu.max", None), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            words = (folder / file).read_text().split()
            if period_file is not None:
                words += (folder / period_file).read_text().split()
            if words[0] != "max" and int(words[0]) > 0 and int(words[1]) > 0:
                yield Quota(cpus=int(words[0]) / int(words[1]), file=folder / file)
        except (OSError, ValueError, IndexError):  # no such group, or a form that is new to us: no limit is known
            continue


def _cpusets(root: Path) -> Iterator[tuple[Path, set[int]]]:
    for folder in control_groups("cpuset", root):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus"):
            try:
                yield folder / name, set(listed_cores((folder / name).read_text()))
            except (OSError, ValueError):
                continue


def listed_cores(text: str) -> list[int]:
    """Cores of a list such as 0-3,8. Raises ValueError for another form."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return [core for bounds in ranges for core in range(int(bounds[0]), int(bounds[-1]) + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mount:
    """A hierarchy of control groups: `part` of it is seen at `point`. `controllers` are version 1's, None for 2."""

    part: str
    point: str
    controllers: frozenset[str] | None


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Of this process's groups that have a controller: each group's own, and those above it as far as they are seen."""
    groups = dict(_groups(root))
    for mount in _mounts(root):
        if mount.controllers is None:
            path = groups.get("")
        else:
            path = next((path for names, path in groups.items() if controller in names.split(",")), None)
        if path is None or controller not in (mount.controllers or {controller}):
            continue
        top = root / mount.point.lstrip("/")
        # In a container the path may be the host's, of which the mount shows a part, or nothing.
        part = mount.part.rstrip("/")
        folder = top / path[len(part) :].lstrip("/") if f"{path}/".startswith(f"{part}/") else top
        if ".." in folder.parts or not folder.is_dir():
            folder = top
        yield from (above for above in (folder, *folder.parents) if above.is_relative_to(top))


def _groups(root: Path) -> Iterator[tuple[str, str]]:
    """By controllers, "" for version 2: the path of this process's group."""
    for line in _lines(root / "proc/self/cgroup"):
        if line.count(":") >= 2:
            _, controllers, path = line.split(":", 2)
            yield controllers, path


def _mounts(root: Path) -> Iterator[_Mount]:
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) > 4 and kind and kind[0] in ("cgroup", "cgroup2"):
            point = fields[4].encode().decode("unicode_escape")  # a space is \040
            controllers = None if kind[0] == "cgroup2" else frozenset(kind[-1].split(","))
            yield _Mount(part=fields[3], point=point, controllers=controllers)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


class ThreadCount:
    """The threads that run, kept within a limit that may change. `asked` is a number that was asked for, 0 for none;
    `most` is another bound, such as OMP_NUM_THREADS."""

    def __init__(
        self,
        read: Callable[[], CpuLimit],
        apply: Callable[[int], object],
        *,
        asked: int = 0,
        most: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._apply, self._clock = read, apply, clock
        self._asked, self._most = asked, most
        self._limit = read()
        self._next = clock() + _EVERY_S
        self.threads = self._chosen()
        apply(self.threads)
        if self._limit.limited:
            _log.info("anychip-cpu runs %s", self)

    def __str__(self) -> str:
        count = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        if self.threads == self._limit.threads:
            return f"{count}: {self._limit.why}"
        return f"{count} as asked, within {self._limit.most}: {self._limit.why}"

    def refresh(self) -> None:
        """Between two steps: reads the limit again when it is time."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + _EVERY_S
        limit = self._read()
        if limit == self._limit:
            return
        self._limit = limit
        threads = self._chosen()
        if threads != self.threads:
            self.threads = threads
            self._apply(threads)
            _log.warning("limits have changed: anychip-cpu runs %s", self)

    def _chosen(self) -> int:
        if self._asked:
            return min(self._asked, self._limit.most)
        return max(1, min(self._limit.threads, self._most or self._limit.threads))
