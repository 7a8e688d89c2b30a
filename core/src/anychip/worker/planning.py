"""Predicts a worker's memory without loading its model.

Weights: the layers are built with their kernels' own allocations, as fake tensors that hold nothing. Activations:
the first layers, among them one of every kind, are built for real, filled with zeros, and run a maximal step; a step
of more layers holds no more. The KV cache then follows from what is free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from anychip.layers.stage import Stage
from anychip.model_config import ModelConfig, load_model_config
from anychip.ops.table import OpTable, resolve_platform_ops
from anychip.plugin_api import (
    Mesh,
    PeakMemory,
    Platform,
    StepLimits,
    WeightView,
    sites_of,
)
from anychip.process_specs import WorkerSpec
from anychip.registry.plugins import Plugins, load_plugins
from anychip.weights.register import WeightRegister, load_weights
from anychip.worker.absent_ranks import AbsentRanks
from anychip.worker.adapters import slot_bytes
from anychip.worker.draft_preparation import prepare_all
from anychip.worker.expert_ranks import check_spread
from anychip.worker.held import check_weights_fit, held_bytes
from anychip.worker.kv_plan import kv_cache_config
from anychip.worker.memory import count_blocks, measure_largest_step, memory_plan
from anychip.worker.model_source import CheckpointSource
from anychip.worker.open_platform import explained, open_for
from anychip.worker.preparation import Preparation, prepare
from anychip.worker.torch_program import TorchStepProgram
from anychip.worker_report import WorkerReady

_LEAST_LAYERS = 4


def plan_worker(spec: WorkerSpec) -> WorkerReady:
    """What a worker of this spec would report. Raises what would keep it from starting, as far as that shows without
    its weights."""
    plugins = load_plugins()
    platform = open_for(spec, plugins)
    try:
        with explained(platform):
            return _planned(spec, plugins, platform)
    finally:
        platform.close("planned")


def _planned(spec: WorkerSpec, plugins: Plugins, platform: Platform) -> WorkerReady:
    ops = resolve_platform_ops(platform, require_native=spec.config.require_native)

    contributed = (plugins.models, plugins.quant_formats)
    whole = prepare_all(spec, load_model_config(spec.config.model), platform, ops, *contributed)
    mesh = whole.mesh(spec, AbsentRanks)
    weights = _weights(whole.source, mesh, whole.limits) * platform.device_mesh.size
    if whole.drafts is not None:  # its passes need less than the target's steps
        weights += _weights(whole.drafts, mesh)
    check_weights_fit(platform, weights, platform.memory(platform.context.device_indexes[0]).free)
    notes = [*ops.notes, *whole.notes, *whole.source.notes, *whole.source.checkpoint.notes]
    if platform.context.manifest.seam == "torch":
        activations = _activations(_part_of(whole, spec, platform, ops, contributed), mesh)
    else:
        activations = PeakMemory(nbytes=0, exact=False)
        notes.append("activations are not counted: the step program says what it needs once it is built")
    graphs = whole.graph_bytes
    blocks = count_blocks(whole, activations, graphs, pending=weights + whole.kept_bytes)
    return WorkerReady(
        kv=kv_cache_config(whole.kv, blocks, whole.num_states),
        rules=whole.rules,
        memory=memory_plan(whole, blocks, weights=weights, activations=activations, graphs=graphs),
        device=f"{platform.name}:{','.join(map(str, spec.device_indexes))}",
        notes=tuple(notes),
    )


def _weights(source: CheckpointSource, mesh: Mesh, limits: StepLimits | None = None) -> int:
    """Bytes of a model's weights, and of the slots for adapters of a model that steps of these limits run."""
    with FakeTensorMode():
        model = source.build_layers(mesh, WeightRegister())
        check_spread(model, source.architecture, source.config)
        return held_bytes(model) + (0 if limits is None else slot_bytes(sites_of(model), limits))


def _part_of(
    whole: Preparation,
    spec: WorkerSpec,
    platform: Platform,
    ops: OpTable,
    contributed: tuple[dict[str, str], Mapping[str, str]],
) -> Preparation:
    """Of the model's first layers, with the embedding and the head that the rank's stage has."""
    config = msgspec.structs.replace(spec.config, pipeline_parallel_size=1, pipeline_layers=())
    stage, num_ranks = whole.source.stage, spec.world_size // spec.config.pipeline_parallel_size
    spec = msgspec.structs.replace(spec, config=config, rank=spec.rank % num_ranks, world_size=num_ranks)
    part = prepare(spec, _first_layers(whole), platform, ops, *contributed)
    part.source.stage = Stage(index=stage.index, count=stage.count)
    return part


def _first_layers(prepared: Preparation) -> ModelConfig:
    """The model, cut after the layers among which every kind of attention is found, and not before the fourth: an
    allocator needs a few to settle."""
    source, model = prepared.source, prepared.model
    every = set(source.attention_specs(prepared.mesh_shape))
    for count in range(min(_LEAST_LAYERS, model.num_layers), model.num_layers):
        raw = {**model.raw, "num_hidden_layers": count}
        if raw.get("layer_types"):
            raw["layer_types"] = raw["layer_types"][:count]
        first = msgspec.structs.replace(model, num_layers=count, raw=raw)
        if set(source.family.attention_specs(first, prepared.mesh_shape, source.dtype, source.kv_dtype)) == every:
            return first
    return model


def _activations(prepared: Preparation, mesh: Mesh) -> PeakMemory:
    register = WeightRegister()
    model = prepared.source.build_layers(mesh, register)
    load_weights(register, _stand_ins(prepared, register), prepared.model.folder)
    register.finish()
    program = TorchStepProgram(
        platform=prepared.platform,
        model=model,
        ops=prepared.source.ops,
        kv=prepared.kv,
        limits=prepared.limits,
        communicators=mesh.opened,
        edits=prepared.edits,
        returning=prepared.returning_ids(mesh),
    )
    return measure_largest_step(prepared, program)


def _stand_ins(prepared: Preparation, register: WeightRegister) -> Iterator[tuple[str, WeightView]]:
    """Zeros; and, of a checkpoint whose containers say more than their shapes, the few tensors that are wanted."""
    slots = list(register.slots.values())
    if any(slot.shape is None or slot.name in register.optional for slot in slots):
        for name, view in prepared.source.checkpoint.views():
            if register.place(name) in register.slots:
                yield name, view
        return
    for slot in slots:
        assert slot.shape is not None
        yield slot.name, Zeros(slot.name, slot.shape, getattr(torch, prepared.source.dtype))


class Zeros:
    """plugin_api.WeightView over nothing."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.source, self.shape, self.dtype = f"zeros for {name!r}", shape, dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self, *bounds: tuple[int, int]) -> Tensor:
        extents = [stop - start for start, stop in bounds]
        return torch.zeros([*extents, *self.shape[len(bounds) :]], dtype=self.dtype)
