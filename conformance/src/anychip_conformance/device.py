"""The judged device: its opened platform, values on their way there and back, and how far results may be off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from anychip.config import EngineConfig
from anychip.errors import DeviceUnavailable, Unsupported
from anychip.ops.table import OpTable, resolve_platform_ops
from anychip.plugin_api import Capabilities, LinearPart, LinearSpec, MoESpec, Platform, PlatformManifest, ProbeResult
from anychip.registry.devices import candidate, choose_named, negotiated, one_process
from anychip.registry.plugins import load_plugins
from anychip.types import DType
from anychip.worker.open_platform import open_platform
from anychip_conformance.forms import Form, laid_out
from anychip_conformance.oracle.vectorised import Bounded
from anychip_conformance.verdicts import Difference, Mismatch, Refused

FINITE_POISON = 30000.0
"""What stands in blocks that hold nothing, where the device declares that they must be finite."""


@dataclass(slots=True)
class Device:
    """`margins` collects the worst error over its bound, by "op/dtype", until somebody takes it."""

    manifest: PlatformManifest
    options: Mapping[str, str]
    probe: ProbeResult
    opened: Platform | None
    """None: the device is not here, and only what a plugin says of itself can be judged."""
    table: OpTable | None
    margins: dict[str, float] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    """Declared capabilities that the present case relies on."""
    resources: dict[str, Any] = field(default_factory=dict)
    """What costs seconds to make and serves several cases, by name; closed with the device where it can be."""
    form: Form = "tidy"
    """Of the tensors of a step that cases make."""

    @property
    def platform(self) -> Platform:
        assert self.opened is not None, f"{self.name} is not here"
        return self.opened

    @property
    def ops(self) -> OpTable:
        assert self.table is not None, f"{self.name} is not here"
        return self.table

    @property
    def capabilities(self) -> Capabilities:
        return self.platform.capabilities

    @property
    def name(self) -> str:
        return self.manifest.name

    # -- values -------------------------------------------------------------------------------------------

    def tensor(self, values: np.ndarray | Sequence[Any], dtype: str, *, written: bool = False) -> Tensor:
        """On the device, rounded to `dtype`: what the oracle then reads back with `seen`. It is a step's, and so comes
        in `form`; `written`: it may be overwritten."""
        return laid_out(self.held(values, dtype), self.form, written=written)

    def held(self, values: np.ndarray | Sequence[Any], dtype: str) -> Tensor:
        """The same of what outlives a step: weights, tables, scales, what a cache is filled with."""
        wide = torch.as_tensor(np.asarray(values))
        return wide.to(getattr(torch, dtype)).to(self.platform.default_device)

    def copied(self, tensor: Tensor) -> Tensor:
        """The same values in storage of their own and in `form`: for what may be overwritten, and is read again."""
        own = tensor.clone(memory_format=torch.contiguous_format)
        return laid_out(own, self.form, written=True)

    @contextmanager
    def formed(self, form: Form) -> Iterator[None]:
        """Within it, tensors of steps come in another form."""
        before, self.form = self.form, form
        try:
            yield
        finally:
            self.form = before

    @property
    def poison(self) -> float:
        """What fills memory that no honest backend reads, or reads without masking it."""
        return float("nan") if self.capabilities.stale_kv == "any" else FINITE_POISON

    # -- verdicts -----------------------------------------------------------------------------------------

    def need(self, capability: str, declared: bool, attempt: Callable[[], Any] | None = None) -> None:
        """The suite's gate for capabilities. What is not declared must be refused by its factory, `attempt`, with
        Unsupported; None: it has no factory."""
        if declared:
            self.used.add(capability)
            return
        if attempt is None:
            raise Refused("", f"{self.name} does not declare {capability}")
        try:
            attempt()
        except Unsupported as refusal:
            raise Refused(capability, str(refusal)) from None
        raise AssertionError(f"{self.name} does not declare {capability}, and its factory does not refuse it either")

    def only_made(self) -> None:
        """The present case made what it needed and judged no result of it: nothing counts as tested by that."""
        self.used.clear()

    def limit(self, what: str, within: bool) -> None:
        """The gate for what is no capability: a case beyond the device's limits is left out, and says why."""
        if not within:
            raise Refused("", f"{self.name}: {what}")

    def reaches(self, dimension: str, size: int) -> None:
        """The gate for sizes: a simulation may be too slow for those of real models, and its probe says so."""
        most = self.probe.devices[0].reach
        self.limit(f"a simulation that is judged at sizes up to {most}", most is None or size <= most)

    def need_dtype(self, dtype: str) -> None:
        part = LinearPart(name="any", offset=0, rows=8)
        spec = LinearSpec(in_features=8, out_features=8, parts=(part,), dtype=cast(DType, dtype))
        self.need(f"dtype {dtype}", dtype in self.capabilities.dtypes, refuses(self, spec))

    def compare(self, what: str, actual: Tensor, expected: Bounded, *, label: str = "") -> None:
        """Raises Mismatch at the first element beyond its bound. `label`, "op/dtype", enters the margin."""
        assert tuple(actual.shape) == expected.value.shape, (
            f"{what} has shape {tuple(actual.shape)}, expected {expected.value.shape}"
        )
        got = seen(actual)
        with np.errstate(invalid="ignore"):
            error = np.abs(got - expected.value)
        error = np.where(got == expected.value, 0.0, np.where(np.isnan(error), np.inf, error))
        beyond = error > expected.bound
        if beyond.any():
            index = tuple(int(i) for i in np.argwhere(beyond)[0])
            raise Mismatch(
                Difference(
                    what=what,
                    index=index,
                    actual=f"{got[index]:.7g}",
                    expected=f"{expected.value[index]:.7g}",
                    error=_finite(float(error[index])),
                    bound=float(expected.bound[index]),
                )
            )
        if label and error.size:
            ratio = float((error / np.maximum(expected.bound, 1e-300)).max())
            self.margins[label] = max(self.margins.get(label, 0.0), ratio)

    def same_bits(self, what: str, actual: Tensor, expected: Tensor) -> None:
        """Raises Mismatch at the first element whose bits differ."""
        assert actual.shape == expected.shape and actual.dtype == expected.dtype, (
            f"{what}: {tuple(actual.shape)} {actual.dtype}, expected {tuple(expected.shape)} {expected.dtype}"
        )
        a, b = bits(actual), bits(expected)
        different = a != b
        if not different.any():
            return
        width = actual.element_size()
        index = np.unravel_index(int(np.flatnonzero(different.ravel())[0]) // width, tuple(actual.shape))
        got, wanted = actual[index].item(), expected[index].item()
        raise Mismatch(
            Difference(
                what=what,
                index=tuple(int(i) for i in index),
                actual=str(got),
                expected=str(wanted),
                error=_finite(abs(float(got) - float(wanted))),
                bound=0.0,
            )
        )

    def take_margins(self) -> dict[str, float]:
        taken, self.margins = self.margins, {}
        return taken

    def close(self) -> None:
        for resource in self.resources.values():
            close = getattr(resource, "close", None)
            if close is not None:
                close()
        if self.opened is not None:
            self.opened.close("judged")


def open_device(name: str, options: Mapping[str, str], index: int = 0) -> Device:
    """Raises DeviceUnavailable with the reason and the remedy; whatever else the plugin raises passes."""
    found = choose_named(name, load_plugins())
    manifest = found.manifest
    every = tuple(device.index for device in found.probe.devices)
    config = EngineConfig(device=name, device_options=dict(options))
    together = one_process(manifest, negotiated(manifest, config, found.probe))
    platform = open_platform(
        manifest,
        device_indexes=every if together else every[index : index + 1],
        options=manifest.options.parse(manifest.package, options),
        probe=found.probe,
    )
    ops = resolve_platform_ops(platform)
    return Device(manifest=manifest, options=options, probe=found.probe, opened=platform, table=ops)


def absent_device(name: str, options: Mapping[str, str]) -> Device:
    """A device that is not here, for cases that need none."""
    manifest = manifest_of(name)
    return Device(manifest=manifest, options=options, probe=candidate(manifest).probe, opened=None, table=None)


def manifest_of(name: str) -> PlatformManifest:
    """Raises DeviceUnavailable, with what is installed and what is broken."""
    plugins = load_plugins()
    if name not in plugins.platforms:
        broken = "".join(f"; {b.package}: {b.error}" for b in plugins.broken)
        there = ", ".join(sorted(plugins.platforms))
        raise DeviceUnavailable(
            f'device {name!r} is not installed; there are {there}{broken}; try pip install "anychip[{name}]"'
        )
    return plugins.platforms[name]


def _finite(error: float) -> float | None:
    return error if np.isfinite(error) else None


def seen(tensor: Tensor) -> np.ndarray:
    """The values as the backend sees them, in float64 on the host."""
    return np.asarray(tensor.detach().to("cpu").to(torch.float64).numpy())


def bits(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, on the host."""
    if tensor.numel() == 0:
        return np.empty(0, dtype=np.uint8)
    return np.asarray(tensor.detach().to("cpu").contiguous().view(torch.uint8).numpy())


def unchanged(device: Device, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    """Remembers inputs; the result raises Mismatch where one has changed since."""
    before = {name: tensor.clone() for name, tensor in tensors.items()}

    def check() -> None:
        for name, tensor in tensors.items():
            device.same_bits(f"input {name}", tensor, before[name])

    return check


def refuses(device: Device, spec: LinearSpec | MoESpec) -> Callable[[], Any]:
    """The factory of a linear or MoE spec, for Device.need."""
    if isinstance(spec, LinearSpec):
        return lambda: device.platform.linear(spec)
    return lambda: device.platform.moe(spec)
