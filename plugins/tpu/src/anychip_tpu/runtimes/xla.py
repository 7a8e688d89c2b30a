"""torch_xla: functions are traced over lazy tensors, compiled by XLA, and run by the hash of their graph.

torch_xla 2.9 is its last release, so the few private calls below, those that its own dynamo bridge makes, are as fixed
as public ones. Running a traced graph by its hash costs some 200 microseconds; tracing it anew at every step would cost
tens of milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as metrics
import torch_xla.distributed.spmd as spmd
import torch_xla.runtime as xr
from torch import Tensor

from anychip.plugin_api import MemoryInfo, Placed, Unsupported
from anychip_tpu.runtimes import Traced
from anychip_tpu.runtimes.choice import on_cpu_devices

_XLAC = torch_xla._XLAC
_ALL = ("shared", "copies")
"""The devices' mesh has two axes: a dimension of fewer units than devices is divided along the first and repeated along
the second."""


class XlaProgram:
    """See Runtime.compile."""

    def __init__(self, fn: Traced, example: Sequence[Tensor], donated: Sequence[int]) -> None:
        torch_xla.sync()  # pending work is dropped below, and nobody's must be
        xm.wait_device_ops()
        metrics.clear_counters()
        shown = [_shown_anew(argument) for argument in example]
        places = {
            _XLAC._xla_get_tensor_id(argument): place
            for arguments in (example, shown)
            for place, argument in enumerate(arguments)
        }
        for place in donated:
            _XLAC._set_buffer_donation(example[place], True)
        outputs = list(fn(*example))
        if fallbacks := metrics.executed_fallback_ops():
            raise Unsupported("torch_xla", [f"{op} has no form on the device" for op in fallbacks])
        # An output that is an argument is no output of the graph.
        same = {id(argument): place for place, argument in enumerate(example)}
        self._passed = [same.get(id(output)) for output in outputs]
        made = [output for output, place in zip(outputs, self._passed, strict=True) if place is None]
        ids, held = _XLAC._get_tensors_xla_device_data_node(made)
        self._places = [places.get(id_) for id_ in ids]
        self._held = [None if place is not None else each for each, place in zip(held, self._places, strict=True)]
        _XLAC._xla_set_enable_alias_with_buffer_donor_config(True)
        self._hash = _XLAC._get_graph_hash(made)
        _XLAC._xla_warm_up_cache(made, [])
        _XLAC._xla_set_enable_alias_with_buffer_donor_config(False)
        for place in donated:
            _XLAC._set_buffer_donation(example[place], False)
        _XLAC._clear_pending_irs(str(torch_xla.device()))

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        inputs = [
            held if place is None else arguments[place] for held, place in zip(self._held, self._places, strict=True)
        ]
        made = iter(_XLAC._run_cached_graph(self._hash, inputs))
        return [next(made) if place is None else arguments[place] for place in self._passed]


def _shown_anew(tensor: Tensor) -> Tensor:
    """Another tensor over the same buffer: with SPMD, graphs know a buffer by the tensor that showed it last."""
    _, (shown,) = _XLAC._get_tensors_xla_device_data_node([tensor])
    found: Tensor = shown
    return found


class XlaRuntime:
    """One process drives `num_devices` devices by SPMD: the compiler divides programs among them."""

    name = "xla"

    def __init__(self, num_devices: int, cache_dir: Path | None) -> None:
        self.num_devices = num_devices
        # Numbers of the code are constants of the programs, not inputs that are uploaded.
        _XLAC._set_xla_all_numbers_special_scalars(True)
        # CPU devices cannot read compiled programs back.
        if cache_dir is not None and not on_cpu_devices() and not _XLAC._xla_computation_cache_is_initialized():
            xr.initialize_cache(str(cache_dir), readonly=False)
        if num_devices > 1:
            xr.use_spmd()
        self.torch_device = str(torch_xla.device())
        self._meshes: dict[int, spmd.Mesh] = {}

    def upload(self, host: Tensor, placed: Placed = ()) -> Tensor:
        sharding = self._sharding(host.shape, placed)
        uploaded: Tensor = xm.send_cpu_data_to_device([host.detach().contiguous()], self.torch_device, sharding)[0]
        return uploaded

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, placed: Placed = ()) -> Tensor:
        made = torch.zeros(tuple(shape), dtype=dtype, device=self.torch_device)
        self.constrain(made, placed)
        torch_xla.sync()
        return made

    def constrain(self, tensor: Tensor, placed: Placed) -> Tensor:
        sharding = self._sharding(tensor.shape, placed)
        if sharding is not None:
            spmd.mark_sharding(tensor, sharding.mesh, sharding.partition_spec)
        return tensor

    def compile(self, fn: Traced, example: Sequence[Tensor], *, donated: Sequence[int] = ()) -> XlaProgram:
        return XlaProgram(fn, example, donated)

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        fetched: list[Tensor] = _XLAC._xla_get_cpu_tensors(list(tensors))
        return fetched

    @property
    def device_kind(self) -> str:
        return str(_XLAC._xla_device_kind(self.torch_device))

    @property
    def num_compilations(self) -> int:
        """Graphs that XLA compiled in this process, whoever asked for them: one that a step left to be run lazily too.
        A program that was read from the cache is none of them."""
        data = metrics.metric_data("CompileTime")
        return int(data[0]) if data else 0

    def memory(self, index: int) -> MemoryInfo:
        if self.num_devices > 1 or on_cpu_devices():
            return MemoryInfo(free=None, total=None)  # the runtime does not say
        info = xm.get_memory_info(self.torch_device)
        total, used = info["bytes_limit"], info["bytes_used"]
        return MemoryInfo(free=total - used, total=total)

    def synchronize(self) -> None:
        torch_xla.sync()
        xm.wait_device_ops()

    def _sharding(self, shape: Sequence[int], placed: Placed) -> spmd.ShardingSpec | None:
        if self.num_devices == 1:
            return None
        found = self._partition(shape, placed)
        mesh, spec = found or (self._mesh(self.num_devices), (None,) * len(shape))
        return spmd.ShardingSpec(mesh, spec)

    def _partition(
        self, shape: Sequence[int], placed: Placed
    ) -> tuple[spmd.Mesh, tuple[str | tuple[str, ...] | None, ...]] | None:
        """The mesh and, by dimension, its axes; None for a tensor that is whole on every device."""
        spec: list[str | tuple[str, ...] | None] = [None] * len(shape)
        shares = self.num_devices
        for each in placed:
            units = shape[each.dim] // each.unit
            if units % self.num_devices == 0 or (each.uneven == "pad" and units > self.num_devices):
                spec[each.dim] = _ALL
            elif each.uneven == "repeat" and self.num_devices % units == 0 and units > 1:
                spec[each.dim], shares = _ALL[0], units
        return (self._mesh(shares), tuple(spec)) if any(spec) else None

    def _mesh(self, shares: int) -> spmd.Mesh:
        mesh = self._meshes.get(shares)
        if mesh is None:
            sizes = (shares, self.num_devices // shares)
            mesh = self._meshes[shares] = spmd.Mesh(np.arange(prod(sizes)), sizes, _ALL)
        return mesh
