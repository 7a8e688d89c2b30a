"""torch's own ops on simulated devices: every op that the CPU has runs on the host's alias of the same bytes.

What an op mutates and returns is read from its schema; no op is listed by hand but for the exceptions below. Views and
allocations stay the vendor's own C++, which needs no kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from anychip_npu_simulator import graphs
from anychip_npu_simulator.errors import Refused
from anychip_npu_simulator.machine import machine
from anychip_npu_simulator.memory import convert, device, host, is_nz, tensors

_VENDORS = frozenset(
    [
        "empty",
        "empty_strided",
        "new_empty_strided",
        "resize_",
        "resize_as_",
        "set_",
        "record_stream",
        "is_pinned",
        "_pin_memory",
        "view",
        "_has_compatible_shallow_copy_type",
        "unsafe_split",
        "unsafe_chunk",
        "lift",
        "lift_fresh",
        "detach_",
        "as_strided_",
    ]
)
"""Allocations and bookkeeping of storages, which the wheel does itself."""
_TAKES_NZ = frozenset(
    ["mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "addmv", "mv", "copy_", "clone", "_to_copy"]
)
"""The vendor's products read FRACTAL_NZ weights, and copies convert them. Others are refused: on a device they compute
on the tiles as they lie, or convert the whole weight at every call."""
_PRODUCTS = frozenset(["mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "addmv", "mv", "dot"])
_PRODUCT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The last is unknown to the matrix units of a 310P."""
_HOST_INDEX = frozenset(
    ["index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "copy_", "_to_copy", "lift"]
)
"""May take tensors of the host beside the device's."""
_READS_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_BY_MASK = frozenset(["index", "_unsafe_index"])
"""Of a shape that depends on values only where an index is a mask."""


class _Generic:
    """One op on the host's aliases."""

    def __init__(self, op: Any) -> None:
        schema = op._schema
        self.op, self.name = op, schema.name
        self.base = schema.name.partition("::")[2]
        written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        self.positions = {a.name: i for i, a in enumerate(schema.arguments)}
        self.written = [a.name for a in written]
        self.out = [a.name for a in written if getattr(a, "is_out", False)]
        self.returns_written = any(r.alias_info is not None and r.alias_info.is_write for r in schema.returns)
        self.num_returns = len(schema.returns)
        self.takes_generator = "generator" in self.positions
        self.random = torch.Tag.nondeterministic_seeded in op.tags
        self.takes_device = "device" in self.positions
        self.reads_values = any(tag in op.tags for tag in _READS_VALUES)

    def argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = self.positions[name]
        return args[position] if position < len(args) else kwargs.get(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = tensors((args, kwargs))
        named = self.argument("device", args, kwargs) if self.takes_device else None
        where = next((tensor.device for tensor in given if tensor.device.type == "npu"), None)
        target = _whole(named) if named is not None else where or _whole("npu")
        self._check(given, where or target)
        if target.type != "npu" and graphs.active():
            raise graphs.host_read(f"{self.name} to the host")
        host_args, host_kwargs = convert(args, host), convert(kwargs, host)
        if self.takes_device:
            host_kwargs |= {"device": "cpu"}
            host_kwargs.pop("pin_memory", None)
        if self.random:
            return self._random(target, args, kwargs, host_args, host_kwargs)
        return self._run(target, args, kwargs, host_args, host_kwargs)

    def _run(self, where: Any, args: Any, kwargs: Any, host_args: Any, host_kwargs: Any) -> Any:
        late = [name for name in self.out if _is_empty(kwargs.get(name))]
        for name in late:  # an alias cannot grow; the device's own tensor can
            host_kwargs[name] = torch.empty(0, dtype=kwargs[name].dtype)
        result = self.op(*host_args, **host_kwargs)
        for name in late:
            kwargs[name].resize_(host_kwargs[name].shape)
            host(kwargs[name]).copy_(host_kwargs[name])
            host_kwargs[name] = host(kwargs[name])
        if self.returns_written:
            answer = [self.argument(name, args, kwargs) for name in self.written]
            answer = answer[0] if self.num_returns == 1 else tuple(answer)
            if graphs.active():
                graphs.record(self.name, self.op, host_args, host_kwargs, [])
            return answer
        if where.type != "npu":
            return result
        answer = convert(result, lambda values: device(values, where))
        if graphs.active():
            graphs.record(self.name, self.op, host_args, host_kwargs, [host(t) for t in tensors(answer)])
        return answer

    def _random(self, where: Any, args: Any, kwargs: Any, host_args: Any, host_kwargs: Any) -> Any:
        """Draws on the host from the device's generator, whose state moves on."""
        given = self.argument("generator", args, kwargs) if self.takes_generator else None
        source = given if given is not None else torch.npu.default_generators[where.index or 0]
        if source.device.type != "npu":
            raise Refused(self.name, "generator", f"of {source.device}", "a generator of the tensor's device")
        seed = hash((source.initial_seed(), source.get_offset()))
        source.set_offset(source.get_offset() + 4)
        if self.takes_generator:
            own = torch.Generator().manual_seed(seed)
            host_args = tuple(own if isinstance(a, torch.Generator) else a for a in host_args)
            if not any(a is own for a in host_args):
                host_kwargs["generator"] = own
            return self._run(where, args, kwargs, host_args, host_kwargs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._run(where, args, kwargs, host_args, host_kwargs)

    def _check(self, given: list[Tensor], where: torch.device) -> None:
        for i, tensor in enumerate(given):
            if (
                tensor.device != where
                and (tensor.dim() or tensor.device.type != "cpu")
                and self.base not in _HOST_INDEX
            ):
                raise Refused(self.name, f"tensor {i}", f"on {tensor.device}", f"tensors of one device, here {where}")
            if self.base not in _TAKES_NZ and is_nz(tensor):
                raise Refused(self.name, f"tensor {i}", "FRACTAL_NZ", "ND; npu_format_cast(tensor, 2) makes it so")
            if self.base in _PRODUCTS:
                allowed = _PRODUCT_DTYPES[: 2 if machine().generation == "310P" else 3]
                if tensor.dtype not in allowed:
                    raise Refused(self.name, f"tensor {i}", tensor.dtype, f"of {allowed}")
        if self.reads_values and graphs.active():
            masks = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:])
            if self.base not in _BY_MASK or masks:
                raise graphs.host_read(self.name)


def _whole(named: Any) -> torch.device:
    """With its index, which is that of the current device where none is named."""
    where = torch.device(named)
    return torch.device("npu", torch.npu.current_device()) if where == torch.device("npu") else where


def _is_empty(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 0


def _copy(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """aten::copy_ within a device, to it and from it. A captured copy may not wait for the host."""
    if graphs.active():
        if src.device.type != "npu" and src.dim():
            if not src.is_pinned():
                raise graphs.host_read("aten::copy_ from unpinned host memory")
        elif self.device.type != "npu" and not non_blocking:
            raise graphs.host_read("aten::copy_ to the host")
    alias, source = host(self), host(src)
    alias.copy_(source)
    if graphs.active():
        graphs.record("aten::copy_", Tensor.copy_, (alias, source), {}, [])
    return self


class _Item(_Generic):
    """aten::_local_scalar_dense. Torch also calls it to make a list of numbers of a tensor that was given for one: on a
    device each element is a wait, and within a graph it fails, so the vendor's ops are refused it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1)
        op = caller.f_locals.get("self")
        if isinstance(op, OpOverload | OpOverloadPacket) and str(op).startswith("npu."):
            given = caller.f_locals.get("kwargs") or {}
            names = [
                name for name, value in given.items() if isinstance(value, Tensor) and not value.is_floating_point()
            ]
            owner = args[0].untyped_storage().data_ptr()
            argument = next((name for name in names if given[name].untyped_storage().data_ptr() == owner), "arguments")
            raise Refused(
                f"npu::{str(op).removeprefix('npu.')}", argument, "a tensor of the device", "a list of host integers"
            )
        return super().__call__(*args, **kwargs)


def _is_view(schema: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def overrides() -> dict[str, Callable[..., Any]]:
    """The kernel of every op of torch that runs on the host's aliases, by qualified name."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    found: dict[str, Callable[..., Any]] = {}
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, name = qualified.partition("::")
        base, _, overload = name.partition(".")
        if namespace != "aten" or base in _VENDORS:
            continue
        if not (has(qualified, "PrivateUse1") or has(qualified, "CPU")):
            continue  # made of other ops
        packet = getattr(torch.ops.aten, base, None)
        op = getattr(packet, overload or "default", None)
        if op is not None and not _is_view(op._schema):
            found[qualified] = _Generic(op)
    found["aten::copy_"] = _copy
    found["aten::_local_scalar_dense"] = _Item(torch.ops.aten._local_scalar_dense.default)
    return found


def install(library: torch.library.Library) -> int:
    """Registers them; returns how many. Where the wheel puts a kernel of its own before autograd, of an op that torch
    makes of others, the simulator's takes that place too: the wheel's goes past the dispatcher."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    kernels = overrides()
    for qualified, kernel in kernels.items():
        library.impl(qualified, kernel, "PrivateUse1", allow_override=True)
        if has(qualified, "AutogradPrivateUse1") and has(qualified, "CompositeImplicitAutograd"):
            library.impl(qualified, kernel, "AutogradPrivateUse1", allow_override=True)
    return len(kernels)
