"""A Runtime that compiles for a slice of TPUs and runs nothing: tensors have a shape and a sharding, and no memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch_xla
import torch_xla.core.xla_builder as xb
from torch import Tensor
from torch.fx.experimental.proxy_tensor import unset_fake_temporarily

from anychip.plugin_api import MemoryInfo, Placed
from anychip_tpu.ahead.modules import with_shardings
from anychip_tpu.ahead.topology import Topology
from anychip_tpu.runtimes import Traced
from anychip_tpu.runtimes.xla import XlaRuntime

_XLAC = torch_xla._XLAC


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedProgram:
    """A function as StableHLO. `donated`: arguments by the output that may take their memory."""

    text: str
    donated: dict[int, int]
    inputs: tuple[Tensor, ...]  # placeholders, by argument

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        raise RuntimeError("a program that was compiled ahead of time for devices that are not here cannot run")


class AheadRuntime(XlaRuntime):
    def __init__(self, topology: Topology) -> None:
        super().__init__(topology.num_devices, cache_dir=None)
        self.topology = topology
        self._num_traced = 0

    @property
    def num_compilations(self) -> int:  # type: ignore[override]
        return self._num_traced

    def upload(self, host: Tensor, placed: Placed = ()) -> Tensor:
        """A placeholder of the tensor's shape; what the tensor holds is not looked at."""
        return self.zeros(tuple(host.shape), host.dtype, placed)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, placed: Placed = ()) -> Tensor:
        with unset_fake_temporarily():
            return self.constrain(xb.create_placeholder_tensor(tuple(shape), dtype), placed)

    def constrain(self, tensor: Tensor, placed: Placed) -> Tensor:
        # mark_sharding wants data; an annotation is an operation of the graph, right behind the parameter.
        sharding = self._sharding(tensor.shape, placed)
        if sharding is not None:
            _XLAC._xla_annotate_custom_sharding(tensor, sharding.mesh.get_op_sharding(sharding.partition_spec))
        return tensor

    def compile(self, fn: Traced, example: Sequence[Tensor], *, donated: Sequence[int] = ()) -> TracedProgram:  # type: ignore[override]
        self._num_traced += 1
        outputs = list(fn(*example))
        same = {id(argument) for argument in example}
        made = [output for output in outputs if id(output) not in same]
        ids, held = _XLAC._get_tensors_xla_device_data_node(made)
        places = {id_: place for place, id_ in enumerate(ids)}
        # A donated argument is one of the caches, which the function gives back first and in order.
        pairs = {}
        for place in donated:
            argument = places.get(_XLAC._xla_get_tensor_id(example[place]))
            output = outputs[place] if place < len(outputs) else None
            index = next((i for i, each in enumerate(made) if each is output), None)
            if argument is not None and index is not None and output.shape == example[place].shape:
                pairs[argument] = index
        text = _XLAC._get_stablehlo(made, str(torch_xla.device()), [], False).decode()
        return TracedProgram(text=with_shardings(text), donated=pairs, inputs=tuple(held))

    def memory(self, index: int) -> MemoryInfo:
        total = self.topology.generation.hbm_bytes_per_device
        return MemoryInfo(free=total, total=total)

    def synchronize(self) -> None:
        pass
