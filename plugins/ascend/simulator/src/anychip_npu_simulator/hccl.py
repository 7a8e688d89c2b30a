"""HCCL over gloo: the calls of cann/hccl.c, between processes of one host, under the vendor's own ProcessGroupHCCL.

Before each collective the ranks compare what they are about to do: on a device, ranks that disagree hang or corrupt
memory; here they are refused with what each of them called.
"""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from anychip_npu_simulator import graphs
from anychip_npu_simulator.errors import Refused

_dist: Any = torch.distributed
_DTYPES = {
    0: torch.int8, 1: torch.int16, 2: torch.int32, 3: torch.float16, 4: torch.float32, 5: torch.int64,
    7: torch.uint8, 10: torch.float64, 11: torch.bfloat16,
}  # fmt: skip
"""HcclDataType (hccl_types.h)."""
_OPS = {0: _dist.ReduceOp.SUM, 1: _dist.ReduceOp.PRODUCT, 2: _dist.ReduceOp.MAX, 3: _dist.ReduceOp.MIN}
_ROOT_INFO_BYTES = 4108
_MIN_BUFFER_MB = 1


@dataclass(slots=True)
class _Communicator:
    group: Any
    rank: int
    size: int


_communicators: dict[int, _Communicator] = {}
"""By the handle that the runtime holds."""


def _alias(address: int, count: int, dtype: torch.dtype) -> Tensor:
    if not count:
        return torch.empty(0, dtype=dtype)
    nbytes = count * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8).view(dtype)


def call(what: str, send: int, recv: int, numbers: list[int]) -> None:
    """One function of hccl.h; while a graph is captured it is written down."""
    if what == "root_info":
        return _root_info(recv)
    if what == "init":
        return _init(send, recv, size=numbers[0], rank=numbers[1], buffer_mb=numbers[2])
    if what == "destroy":
        _communicators.pop(numbers[5], None)
        return None
    communicator = _communicators.get(numbers[5])
    if communicator is None:
        raise Refused(f"Hccl {what}", "comm", numbers[5], "a communicator that is open")
    if what == "all_to_all_v":  # its counts lie on the host and may be gone at a replay
        numbers = [*numbers[:5], numbers[5], *_counts(numbers, communicator.size)]
    if graphs.active():
        graphs.record_call(f"Hccl {what}", lambda: _run(communicator, what, send, recv, numbers))
    return _run(communicator, what, send, recv, numbers)


def _root_info(out: int) -> None:
    """Where the ranks meet: a file that the root names."""
    handle, path = tempfile.mkstemp(prefix="anychip-hccl-")
    os.close(handle)
    text = path.encode()
    ctypes.memset(out, 0, _ROOT_INFO_BYTES)
    ctypes.memmove(out, text, len(text))


def _init(info: int, out: int, size: int, rank: int, buffer_mb: int) -> None:
    path = ctypes.string_at(info).decode()
    if buffer_mb and buffer_mb != 0xFFFFFFFF and buffer_mb < _MIN_BUFFER_MB:
        raise Refused("HcclCommInitRootInfoConfig", "hcclBufferSize", f"{buffer_mb} MB", f"{_MIN_BUFFER_MB} MB or more")
    timeout = timedelta(seconds=float(os.environ.get("HCCL_CONNECT_TIMEOUT") or 120))
    store = _dist.FileStore(path, size)
    group = _dist.ProcessGroupGloo(_dist.PrefixStore("hccl", store), rank, size, timeout)
    group.barrier().wait()
    if rank == 0:  # all have met; a rank that is killed later leaves no file behind
        os.unlink(path)
    handle = len(_communicators) + 1
    while handle in _communicators:
        handle += 1
    _communicators[handle] = _Communicator(group, rank, size)
    ctypes.c_uint64.from_address(out).value = handle


def _counts(numbers: list[int], size: int) -> list[list[int]]:
    """send counts, send offsets, receive counts, receive offsets, in elements."""
    addresses = (numbers[0], numbers[2], numbers[3], numbers[4])
    return [list((ctypes.c_uint64 * size).from_address(address)) for address in addresses]  # type: ignore[misc]


def _agree(c: _Communicator, what: str, described: list[Any]) -> None:
    mine = torch.zeros(256, dtype=torch.uint8)
    text = json.dumps([what, *described]).encode()[:256]
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    all_of_them = [torch.empty_like(mine) for _ in range(c.size)]
    c.group.allgather([all_of_them], [mine]).wait()
    said = [bytes(t.tolist()).rstrip(b"\0").decode() for t in all_of_them]
    if len(set(said)) > 1:
        raise Refused(f"Hccl {what}", "call", "not the same on every rank", f"one call of all ranks; they said {said}")


def _run(c: _Communicator, what: str, send: int, recv: int, numbers: list[Any]) -> None:
    count, kind, third = numbers[0], numbers[1], numbers[2]
    if what == "barrier":
        c.group.barrier().wait()
        return
    if kind not in _DTYPES:
        raise Refused(f"Hccl {what}", "dataType", kind, f"of {sorted(_DTYPES)}")
    dtype = _DTYPES[kind]
    if what in ("send", "recv"):
        buffer = _alias(send, count, dtype)
        (c.group.send if what == "send" else c.group.recv)([buffer], third, 0).wait()
        return
    if what == "all_to_all_v":
        _agree(c, what, [kind])
        _all_to_all_v(c, send, recv, dtype, numbers[6:])
        return
    _agree(c, what, [count, kind, third])
    if what == "all_reduce":
        out = _alias(recv, count, dtype)
        if send != recv:
            out.copy_(_alias(send, count, dtype))
        options = _dist.AllreduceOptions()
        options.reduceOp = _OPS[third]
        c.group.allreduce([out], options).wait()
    elif what == "broadcast":
        c.group.broadcast(_alias(send, count, dtype), third).wait()
    elif what == "all_gather":
        mine, parts = _alias(send, count, dtype).clone(), _alias(recv, count * c.size, dtype).chunk(c.size)
        c.group.allgather([list(parts)], [mine]).wait()
    elif what == "reduce_scatter":
        whole = _alias(send, count * c.size, dtype).clone()
        options = _dist.AllreduceOptions()
        options.reduceOp = _OPS[third]
        c.group.allreduce([whole], options).wait()
        _alias(recv, count, dtype).copy_(whole.chunk(c.size)[c.rank])
    elif what == "all_to_all":
        mine = _alias(send, count * c.size, dtype).clone()
        c.group.alltoall_base(_alias(recv, count * c.size, dtype), mine, [], []).wait()
    else:
        raise Refused(f"Hccl {what}", "function", "not simulated", "the functions of cann/hccl.c")


def _all_to_all_v(c: _Communicator, send: int, recv: int, dtype: torch.dtype, counts: list[list[int]]) -> None:
    send_counts, send_offsets, recv_counts, recv_offsets = counts
    source = _alias(send, max(o + n for o, n in zip(send_offsets, send_counts, strict=True)), dtype)
    parts = [source[o : o + n] for o, n in zip(send_offsets, send_counts, strict=True)]
    out = torch.empty(sum(recv_counts), dtype=dtype)
    c.group.alltoall_base(out, torch.cat(parts), recv_counts, send_counts).wait()
    target = _alias(recv, max(o + n for o, n in zip(recv_offsets, recv_counts, strict=True)), dtype)
    for offset, part in zip(recv_offsets, out.split(recv_counts), strict=True):
        target[offset : offset + len(part)] = part
