"""A Runtime of the host: functions run as they are. It stands for a TPU's where the plugin's own code is tested."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from anychip import LLM
from anychip.plugin_api import DeviceInfo, MemoryInfo, Placed, ProbeResult
from anychip_tpu.runtimes import Traced


class Donated(RuntimeError):
    """An argument was used after it had been given away."""


class HostRuntime:
    """Remembers what was donated, and refuses it as an argument of a later call."""

    name, torch_device, num_devices, device_kind = "host", "cpu", 1, "cpu"

    def __init__(self) -> None:
        self.num_compilations = 0

    def upload(self, host: Tensor, placed: Placed = ()) -> Tensor:
        return host.clone()

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, placed: Placed = ()) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def constrain(self, tensor: Tensor, placed: Placed) -> Tensor:
        return tensor

    def compile(
        self, fn: Traced, example: Sequence[Tensor], *, donated: Sequence[int] = ()
    ) -> Callable[..., list[Tensor]]:
        self.num_compilations += 1
        given_away: set[int] = set()
        kept: list[Tensor] = []
        signature = [(argument.shape, argument.dtype) for argument in example]
        fn(*example)  # a real one traces here, and learns how many results there are

        def program(*arguments: Tensor) -> list[Tensor]:
            assert [(argument.shape, argument.dtype) for argument in arguments] == signature
            if any(id(argument) in given_away for argument in arguments):
                raise Donated
            kept.extend(arguments[place] for place in donated)  # an id must not come again
            given_away.update(id(arguments[place]) for place in donated)
            with torch.no_grad():
                return [*fn(*arguments)]

        return program

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def memory(self, index: int) -> MemoryInfo:
        return MemoryInfo(free=None, total=None)

    def synchronize(self) -> None:
        return


@contextmanager
def on_the_host(folder: Path, **settings: object) -> Iterator[LLM]:
    """An LLM of device tpu over a HostRuntime."""
    device = DeviceInfo(index=0, name="host", backing="cpu_runtime")
    probed = ProbeResult(devices=(device,), versions={"torch": "2.9.0", "torch_xla": "2.9.0"})
    with (
        patch("anychip_tpu.probe.probe", lambda: probed),
        patch("anychip_tpu.platform.open_runtime", lambda options, context: HostRuntime()),
        patch.dict("os.environ", {"PJRT_DEVICE": "TPU"}),
        LLM(model=str(folder), device="tpu", **settings) as llm,  # type: ignore[arg-type]
    ):
        yield llm
