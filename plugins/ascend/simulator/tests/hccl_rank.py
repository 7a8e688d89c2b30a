"""One rank of test_sim_hccl.py: prints what each collective gave, as JSON."""

import json
import os
import sys
from datetime import timedelta

from anychip_npu_simulator.install import install

install()

import torch  # noqa: E402
import torch_npu  # noqa: E402, F401
from torch_npu._C._distributed_c10d import ProcessGroupHCCL  # noqa: E402

rank, size, path, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.npu.set_device(rank)
device = f"npu:{rank}"
options = ProcessGroupHCCL.Options()
options._timeout = timedelta(seconds=60)
options.global_ranks_in_group = list(range(size))
group = ProcessGroupHCCL(torch.distributed.FileStore(path, -1), rank, size, options)


def values(*shape, dtype=torch.float32):
    """rank * 100 and on."""
    return (torch.arange(torch.Size(shape).numel(), device=device).view(shape) + 100 * rank).to(dtype)


def all_reduce(dtype):
    x = values(5, dtype=dtype)
    group.allreduce([x]).wait()
    return x.tolist()


def all_gather():
    x = values(3)
    parts = [torch.empty_like(x) for _ in range(size)]
    group.allgather([parts], [x]).wait()
    return [part.tolist() for part in parts]


def reduce_scatter():
    parts = [values(2) + 1000 * i for i in range(size)]
    out = torch.empty(2, device=device)
    group.reduce_scatter([out], [parts]).wait()
    return out.tolist()


def all_to_all():
    x = values(size, 2)
    out = torch.empty_like(x)
    group.alltoall_base(out, x, [], []).wait()
    return out.tolist()


def all_to_all_v():
    send, receive = [(rank + j) % 3 for j in range(size)], [(rank + j) % 3 for j in range(size)]
    out = torch.empty(sum(receive), 2, device=device)
    group.alltoall_base(out, values(sum(send), 2), receive, send).wait()
    return out.tolist()


def broadcast():
    x = values(2, dtype=torch.int32)
    group.broadcast(x, 1).wait()
    return x.tolist()


def send_and_receive():
    x = values(2)
    if rank == 0:
        group.send([x], 1, 0).wait()
    if rank == 1:
        group.recv([x], 0, 0).wait()
    return x.tolist()


def captured():
    x, graph = values(2), torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y = x * 2
        group.allreduce([y]).wait()
        z = y + 1
    x.fill_(rank + 1)
    graph.replay()
    return z.tolist()


def disagree():
    try:
        group.allreduce([values(4 + rank)]).wait()
    except RuntimeError as error:
        return "not the same on every rank" in str(error)
    return False


RUNS = {
    "all_reduce": lambda: [all_reduce(d) for d in (torch.float32, torch.bfloat16, torch.int32)],
    "all_gather": all_gather,
    "reduce_scatter": reduce_scatter,
    "all_to_all": all_to_all,
    "all_to_all_v": all_to_all_v,
    "broadcast": broadcast,
    "send_and_receive": send_and_receive,
    "captured": captured,
    "disagree": disagree,
}
sys.stdout.write(json.dumps({name: RUNS[name]() for name in (what.split(",") if what != "all" else RUNS)}) + "\n")
sys.stdout.flush()
os._exit(0)  # the vendor's watchdogs are not waited for
