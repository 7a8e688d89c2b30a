"""A model with shapes and no weights, for devices that are not there: what a plugin's command compiles step programs
from ahead of time. Of core, such a command imports this module beside plugin_api. It loads torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from anychip.config import EngineConfig
from anychip.errors import ConfigError
from anychip.hub import located
from anychip.model_config import ModelConfig, load_model_config
from anychip.ops.table import resolve_platform_ops
from anychip.plugin_api import (
    KVPlan,
    Mesh,
    Platform,
    PlatformManifest,
    ProbeResult,
    ShapePolicy,
    StepLimits,
    StepModel,
    WeightView,
)
from anychip.process_specs import WorkerSpec
from anychip.registry.devices import parsed_options
from anychip.registry.plugins import load_plugins
from anychip.weights.register import WeightRegister, load_weights
from anychip.worker.held import held_bytes
from anychip.worker.model_source import CheckpointSource
from anychip.worker.open_platform import open_platform
from anychip.worker.planning import Zeros
from anychip.worker.preparation import prepare


class WeightlessSource(CheckpointSource):
    """`build` gives a model whose tensors are fake: they say that they are on the host, and hold no memory."""

    def build(self, mesh: Mesh) -> StepModel:
        register = WeightRegister()
        with FakeTensorMode():
            model = self.build_layers(mesh, register)
            load_weights(register, self._zeros(register), self.model.folder)
            self.held_bytes += held_bytes(model)
            register.finish()
        return model

    def _zeros(self, register: WeightRegister) -> Iterator[tuple[str, WeightView]]:
        for slot in list(register.slots.values()):
            if slot.shape is None:
                raise ConfigError(
                    f"the shape of {slot.name} is known from a quantized checkpoint alone; use the unquantized model's "
                    "config.json with --quantization"
                )
            yield slot.name, Zeros(slot.name, slot.shape, getattr(torch, self.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Weightless:
    model: ModelConfig
    platform: Platform
    source: WeightlessSource
    kv: KVPlan
    limits: StepLimits
    policy: ShapePolicy
    kept_bytes: int
    """Of what a program's state holds beside the caches."""


def described(settings: Mapping[str, Any]) -> ModelConfig:
    """The model that fields of EngineConfig name."""
    return load_model_config(located(EngineConfig(**settings)).model)


def weightless(settings: Mapping[str, Any], manifest: PlatformManifest, probe: ProbeResult) -> Weightless:
    """What a step program of `manifest`'s platform would be made from on the devices of `probe`. `settings` are fields
    of EngineConfig. Raises what would keep an engine from starting, as far as that shows without weights."""
    config = located(EngineConfig(**{**settings, "device": manifest.name, "load_format": "dummy"}))
    plugins = load_plugins()
    indexes = tuple(device.index for device in probe.devices)
    platform = open_platform(
        manifest, device_indexes=indexes, options=parsed_options(manifest, config.device_options), probe=probe
    )
    spec = WorkerSpec(
        config=config, device=manifest.name, device_indexes=indexes, rank=0, world_size=1, store="", folder="",
        probe=msgspec.to_builtins(probe),
    )  # fmt: skip
    ops = resolve_platform_ops(platform)
    model = load_model_config(config.model)
    prepared = prepare(spec, model, platform, ops, plugins.models, plugins.quant_formats)
    source = WeightlessSource(
        config=config, model=model, platform=platform, ops=ops, contributed=plugins.models,
        quant_formats=plugins.quant_formats,
    )  # fmt: skip
    return Weightless(
        model=model, platform=platform, source=source, kv=prepared.kv, limits=prepared.limits,
        policy=prepared.policy, kept_bytes=prepared.kept_bytes,
    )  # fmt: skip
