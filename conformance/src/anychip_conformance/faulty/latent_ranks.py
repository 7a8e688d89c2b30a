"""Faults of latent attention that is divided over devices: its heads are, the rows that they share are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anychip.plugin_api import KVPlan, LatentLayer, MeshShape, ModelSource, StepLimits
from anychip_conformance.fakes.functional_latents import FunctionalLatent
from anychip_conformance.fakes.spmd import SpmdStepProgram
from anychip_conformance.faulty.registry import fault


@fault("mesh-latent-factors-of-another-rank", "mesh", killed_by="e2e.page_kinds.002")
class LatentFactorsOfAnotherRank(SpmdStepProgram):
    """One device folds its queries with the factors of its neighbour's heads."""

    def __init__(self, source: ModelSource, kv: KVPlan, limits: StepLimits, shape: MeshShape) -> None:
        super().__init__(source, kv, limits, shape)
        for mine, other in zip(_latents(self.models[1]), _latents(self.models[0]), strict=True):
            mine.k_up = other.k_up


@fault("mesh-latent-rows-divided", "mesh", killed_by="e2e.page_kinds.002")
class LatentRowsDivided(SpmdStepProgram):
    """A device keeps its share of a row's latent values, as if they were heads."""

    def __init__(self, source: ModelSource, kv: KVPlan, limits: StepLimits, shape: MeshShape) -> None:
        super().__init__(source, kv, limits, shape)
        for rank, model in enumerate(self.models):
            for backend in model.attention:
                if isinstance(backend, FunctionalLatent):
                    _keep_share(backend, shape.place("tp", rank), shape.tp)


def _keep_share(backend: Any, index: int, count: int) -> None:
    write, size = backend.write_rows, backend.spec.latent_dim // count
    kept = torch.zeros(backend.spec.latent_dim)
    kept[index * size : (index + 1) * size] = 1

    def write_share(latent: Tensor, k_rope: Tensor, cache: Any, plan: Any, layer: LatentLayer) -> Any:
        return write(latent * kept.to(latent.dtype), k_rope, cache, plan, layer)

    backend.write_rows = write_share


def _latents(model: Any) -> list[LatentLayer]:
    found = [layer.attention.layer for layer in model.layers]
    return [layer for layer in found if isinstance(layer, LatentLayer)]
