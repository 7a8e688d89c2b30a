"""Collectives over two and three real processes, with numbers that name the rank they come from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anychip_cpu.native import built, load

FORKS = """
import os
import sys
import torch
from anychip.plugin_api import DeviceFault, GroupSpec
from anychip_cpu.communicator import communicator
from anychip_cpu.native import load

def rank_of_fork(size):
    # A process for each rank, of which all but rank 0 are forks: torch is loaded once, and has started no thread yet.
    global pids
    pids = []
    for rank in range(1, size):
        pid = os.fork()
        if pid == 0:
            return rank
        pids.append(pid)
    return 0

def end(rank):
    # Rank 0 ends last, and only it speaks.
    if rank:
        os._exit(0)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids), "a rank has failed"
    print("fine")
"""

PROGRAM = """
size, store, isa = int(sys.argv[1]), sys.argv[2], sys.argv[3]
rank = rank_of_fork(size)
spec = GroupSpec(ranks=tuple(range(size)), rank=rank, purpose="test", max_message_bytes=1 << 20,
                 store=f"file://{store}", timeout_s=60)
c = communicator(spec, load(isa))
assert c.name == ("gloo" if isa == "reference" else "shared-memory"), c.name
for dtype in (torch.float32, torch.bfloat16):
    for n in (0, 1, 7, 64):
        mine = torch.full((n, 3), float(rank + 1), dtype=dtype)
        assert c.all_reduce(mine.clone()).eq(sum(range(1, size + 1))).all(), "all_reduce"
        gathered = c.all_gather(mine, dim=1)
        assert gathered.shape == (n, 3 * size)
        for r in range(size):
            assert gathered[:, 3 * r : 3 * r + 3].eq(r + 1).all(), "all_gather"
# Longer than a slot; by place and rank, so that a piece at a wrong place shows.
long = torch.arange(700_000, dtype=torch.float32) % 1000 + rank
assert c.all_reduce(long.clone()).equal((long - rank) * size + sum(range(size))), "all_reduce in pieces"
c.restore()
assert c.all_reduce(torch.ones(3)).tolist() == [float(size)] * 3, "all_reduce after restore"
sizes = [2 * r + 1 for r in range(size)]
uneven = c.all_gather_v(torch.full((sizes[rank], 2), float(rank)), sizes)
assert uneven[:, 0].tolist() == [float(r) for r in range(size) for _ in range(sizes[r])], "all_gather_v"
shares = torch.arange(float(size)).repeat_interleave(2) + 10 * rank
assert c.reduce_scatter(shares).tolist() == [size * rank + 10 * sum(range(size))] * 2, "reduce_scatter"
scattered = c.reduce_scatter_v(torch.ones(sum(sizes)), sizes)
assert scattered.tolist() == [float(size)] * sizes[rank], "reduce_scatter_v"
exchanged = c.all_to_all(torch.tensor([10.0 * rank + j for j in range(size)]))
assert exchanged.tolist() == [10.0 * j + rank for j in range(size)], "all_to_all"
send = [rank + 1] * size
receive = [j + 1 for j in range(size)]
ragged = c.all_to_all_v(torch.full((sum(send),), float(rank)), send, receive)
assert ragged.tolist() == [float(j) for j in range(size) for _ in range(j + 1)], "all_to_all_v"
# Rows travel while others are exchanged and summed.
later = c.begin_all_to_all_v(torch.full((sum(send),), 10.0 + rank), send, receive)
assert c.all_to_all_v(torch.full((sum(send),), float(rank)), send, receive).equal(ragged), "one exchange beside another"
assert c.all_reduce(torch.ones(3)).tolist() == [float(size)] * 3, "a sum beside an exchange"
assert later().tolist() == [10.0 + j for j in range(size) for _ in range(j + 1)], "begin_all_to_all_v"
root = size - 1
assert c.broadcast(torch.tensor([float(rank)]), root).item() == root, "broadcast"
if rank == 0:
    c.send(torch.tensor([5.0]), 1)
elif rank == 1:
    assert c.recv(torch.empty(1), 0).item() == 5.0, "recv"
c.barrier()
end(rank)
"""


@pytest.mark.parametrize(("size", "isa"), [(2, "reference"), (3, "reference"), (3, "generic")])
def test_every_collective_brings_each_ranks_numbers_to_the_right_place(size: int, isa: str, tmp_path: Path) -> None:
    if isa != "reference" and not built():
        pytest.skip("no kernels were compiled")
    command = [sys.executable, "-c", FORKS + PROGRAM, str(size), str(tmp_path / "store"), isa]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "fine", done.stderr[-1500:]


def test_a_rank_that_never_comes_is_an_error_within_the_timeout(tmp_path: Path) -> None:
    if not built():
        pytest.skip("no kernels were compiled")
    kernels = load("generic")
    region = torch.zeros(2 * 64 + 4 * 4096, dtype=torch.uint8)
    mine = torch.ones(8)
    assert not kernels.all_reduce(region.data_ptr(), 0, 2, 4096, mine.data_ptr(), 8, 0, 0.05)


LEFT_ALONE = """
store, isa = sys.argv[1], sys.argv[2]
rank = rank_of_fork(2)
spec = GroupSpec(ranks=(0, 1), rank=rank, purpose="tensor_parallel", max_message_bytes=1 << 20,
                 store=f"file://{store}", timeout_s=2)
c = communicator(spec, load(isa))
c.barrier()
if rank == 1:
    os._exit(0)
for collective in (c.all_reduce, c.all_gather):
    try:
        collective(torch.ones(8))
    except DeviceFault as fault:
        assert fault.fatal and fault.kind in ("peer_lost", "timeout"), fault.kind
        assert "tensor_parallel, rank 0 of (0, 1)" in str(fault), fault
    else:
        raise AssertionError("a collective with a dead rank has returned")
end(rank)
"""


@pytest.mark.parametrize("isa", ["reference", "generic"])
def test_a_rank_that_died_is_a_fault_that_names_the_group(isa: str, tmp_path: Path) -> None:
    if isa != "reference" and not built():
        pytest.skip("no kernels were compiled")
    command = [sys.executable, "-c", FORKS + LEFT_ALONE, str(tmp_path / "store"), isa]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "fine", done.stderr[-1500:]
