"""How many threads may run: control groups of either version in a folder of the test's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anychip.plugin_api import Unsupported
from anychip_cpu import RANKS_VARIABLE, limits
from anychip_cpu.limits import CpuLimit, ThreadCount, cpu_limit, cpu_quota, listed_cores

V2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"
V1 = "31 24 0:27 {} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
V1_SETS = "32 24 0:28 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(limits, "allowed_cores", lambda: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


def system(root: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


CASES = {
    "2, in a namespace": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
    "2, a group's own": ("0::/a/b", V2, {"sys/fs/cgroup/a/b/cpu.max": "50000 100000"}, 0.5),
    "2, the one above is less": (
        "0::/a/b",
        V2,
        {"sys/fs/cgroup/a/cpu.max": "200000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"},
        2.0,
    ),
    "2, no limit": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "max 100000"}, None),
    "2, the host's path is not seen": ("0::/../../pod", V2, {"sys/fs/cgroup/cpu.max": "300000 100000"}, 3.0),
    "1": (
        "4:cpu,cpuacct:/",
        V1.format("/"),
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        2.5,
    ),
    "1, a part of the host's": (
        "4:cpu,cpuacct:/docker/x/inner",
        V1.format("/docker/x"),
        {
            "sys/fs/cgroup/cpu,cpuacct/inner/cpu.cfs_quota_us": "20000",
            "sys/fs/cgroup/cpu,cpuacct/inner/cpu.cfs_period_us": "10000",
        },
        2.0,
    ),
    "1, no limit": (
        "4:cpu,cpuacct:/",
        V1.format("/"),
        {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000"},
        None,
    ),
    "both, 1 has the controller": (
        "1:cpu:/\n0::/",
        V1.format("/").replace("cpu,cpuacct", "cpu") + "\n" + V2.replace("/cgroup rw", "/cgroup/unified rw"),
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
        1.0,
    ),
    "a form that nobody knows": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "plenty"}, None),
    "none": ("", "", {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_quotas_of_both_versions(case, tmp_path):
    groups, mounts, files, cpus = CASES[case]
    found = cpu_quota(system(tmp_path, groups, mounts, files))
    assert (found and found.cpus) == cpus


@pytest.mark.parametrize(
    ("quota", "ranks", "threads", "most"),
    [(0.5, 1, 1, 1), (1.0, 1, 1, 1), (1.5, 1, 1, 2), (2.5, 1, 2, 3), (7.9, 1, 7, 8), (4.0, 2, 2, 2), (1.0, 4, 1, 1)],
)
def test_threads_are_the_quota_without_its_fraction(eight_cores, tmp_path, quota, ranks, threads, most):
    files = {"sys/fs/cgroup/cpu.max": f"{int(quota * 100000)} 100000"}
    limit = cpu_limit(root=system(tmp_path, "0::/", V2, files), ranks=ranks)
    assert (limit.threads, limit.most) == (threads, most)
    assert f"a quota of {quota:g} CPUs" in str(limit) and "cpu.max" in str(limit)
    assert ("below one core" in str(limit)) == (quota / ranks < 1)


def test_a_quota_above_the_cores_limits_nothing(eight_cores, tmp_path):
    files = {"sys/fs/cgroup/cpu.max": "900000 100000"}
    assert str(cpu_limit(root=system(tmp_path, "0::/", V2, files))) == "8 threads: all 8 cores"


def test_a_cpuset_and_an_affinity_are_told_apart(eight_cores, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "allowed_cores", lambda: {2, 3, 6})
    root = system(tmp_path, "3:cpuset:/", V1_SETS, {"sys/fs/cgroup/cpuset/cpuset.effective_cpus": "2-3,6"})
    assert "3 of 8 cores by the cpuset" in str(cpu_limit(root=root))
    monkeypatch.setattr(limits, "allowed_cores", lambda: {2})
    assert str(cpu_limit(root=root)) == "1 thread: 1 of 8 cores by this process's affinity"


@given(st.sets(st.integers(0, 200), min_size=1))
def test_lists_of_cores_are_read_back(cores):
    parts, ordered = [], sorted(cores)
    while ordered:
        end = next((i for i in range(1, len(ordered)) if ordered[i] != ordered[0] + i), len(ordered))
        parts.append(f"{ordered[0]}-{ordered[end - 1]}" if end > 1 else str(ordered[0]))
        ordered = ordered[end:]
    assert listed_cores(",".join(parts) + "\n") == sorted(cores)


def test_a_limit_that_changes_is_followed_between_steps(caplog):
    now, applied = [0.0], []
    limit = [CpuLimit(threads=4, most=4, why="all 4 cores")]
    count = ThreadCount(lambda: limit[0], applied.append, clock=lambda: now[0])
    limit[0] = CpuLimit(threads=2, most=3, why="a quota of 2.5 CPUs")
    count.refresh()
    assert applied == [4]  # not at every step
    now[0] += 60
    count.refresh()
    assert applied == [4, 2]
    assert "2 threads: a quota of 2.5 CPUs" in caplog.text
    limit[0], now[0] = CpuLimit(threads=4, most=4, why="all 4 cores"), 120
    count.refresh()
    assert applied == [4, 2, 4]


def test_a_number_that_was_asked_for_stays_within_the_limit():
    now, applied = [0.0], []
    limit = [CpuLimit(threads=8, most=8, why="all 8 cores")]
    count = ThreadCount(lambda: limit[0], applied.append, asked=3, clock=lambda: now[0])
    for cpus, _ in ((5, 3), (2, 2), (8, 3)):
        limit[0], now[0] = CpuLimit(threads=cpus, most=cpus, why=""), now[0] + 60
        count.refresh()
    assert applied == [3, 2, 3]


def test_the_platform_refuses_more_threads_than_the_quota(open_cpu, monkeypatch, caplog):
    half = CpuLimit(threads=1, most=1, why="a quota of 0.5 CPUs, below one core (/sys/fs/cgroup/cpu.max)")
    monkeypatch.setattr("anychip_cpu.platform.cpu_limit", lambda ranks: half)
    with pytest.raises(Unsupported, match=r"threads=2: this process may use 1, a quota of 0\.5 CPUs"):
        open_cpu(threads=2)
    with caplog.at_level("INFO", logger="anychip.plugins"):
        assert open_cpu(threads=0).threads.threads == 1
    assert "anychip-cpu runs 1 thread: a quota of 0.5 CPUs, below one core" in caplog.text


def test_ranks_share_the_quota(open_cpu, monkeypatch):
    asked = []
    monkeypatch.setenv(RANKS_VARIABLE, "3")
    limit = CpuLimit(threads=1, most=1, why="")
    monkeypatch.setattr("anychip_cpu.platform.cpu_limit", lambda ranks: asked.append(ranks) or limit)
    platform = open_cpu(threads=1)
    assert set(asked) == {3}
    platform.event()  # a step: it is too soon to read again
    assert len(asked) == 2
