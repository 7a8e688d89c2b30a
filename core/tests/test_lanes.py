"""Data-parallel lanes give the tokens of one process; a lane without requests keeps nobody waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks_in_threads import on_ranks
from torch import Tensor

from anychip import EngineConfig
from anychip.model_config import load_model_config
from anychip.ops.table import resolve_platform_ops
from anychip.plugin_api import Mesh, MeshShape
from anychip.worker.model_source import CheckpointSource
from anychip_conformance.device import open_device
from anychip_conformance.equality.tiny_models import make_checkpoint

# -- what a mixture's layer does in a step --------------------------------------------------------------------


@pytest.fixture(scope="module")
def cpu() -> Any:
    device = open_device("cpu", {})
    yield device
    device.close()


def built(folder: Any, cpu: Any, mesh: Mesh) -> Any:
    config = EngineConfig(model=str(folder), device="cpu", dtype="float32")
    return CheckpointSource(
        config=config,
        model=load_model_config(str(folder)),
        platform=cpu.platform,
        ops=resolve_platform_ops(cpu.platform),
        contributed={},
    ).build(mesh)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_lane_without_tokens_runs_its_experts_on_those_of_the_others(tmp_path: Any, cpu: Any, tp: int) -> None:
    """First the one lane has tokens, then the other, then both, then neither."""
    make_checkpoint("deepseek-v3", tmp_path)
    shape = MeshShape(dp=2, tp=tp, joined={"ep": ("dp", "tp")})
    alone = built(tmp_path, cpu, Mesh.alone())
    hidden = alone.expert_layers[0].spec.hidden_size
    given: list[list[int]] = [[5, 0], [0, 3], [1, 7], [0, 0]]  # tokens by lane
    tokens = [[torch.randn(count, hidden, generator=torch.Generator().manual_seed(count)) for count in e] for e in given]

    def one(communicator: Any, rank: int) -> list[Tensor | None]:
        mesh = Mesh(shape, rank, communicator)
        model, found = built(tmp_path, cpu, mesh), list[Tensor | None]()
        for lanes in tokens:
            x = lanes[shape.coordinates(rank)["dp"]]
            for layer in model.expert_layers:
                found.append(layer(x, None) if len(x) else layer.join())
        return found

    for rank, results in enumerate(on_ranks(shape.size, one)):
        inputs = [lanes[shape.coordinates(rank)["dp"]] for lanes in tokens]
        wanted = [layer(x, None) if len(x) else None for x in inputs for layer in alone.expert_layers]
        for result, expected in zip(results, wanted, strict=True):
            if expected is None:
                assert result is None
            else:
                assert result is not None
                torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
