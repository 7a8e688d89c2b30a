"""What a step program gets of a checkpoint: config, named tensors, and a way to hold its weights once."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from anychip.config import EngineConfig
from anychip.model_config import load_model_config
from anychip.plugin_api import Mesh, MeshShape
from anychip.worker.held import held_bytes
from anychip.worker.model_source import CheckpointSource
from anychip_conformance.device import open_device
from anychip_conformance.equality.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", path)
    return path


def source(folder, **settings) -> CheckpointSource:
    device = open_device("fake-static", {})
    config = EngineConfig(model=str(folder), device="fake-static", **settings)
    model = load_model_config(str(folder))
    return CheckpointSource(config=config, model=model, platform=device.platform, ops=device.ops, contributed={})


def test_weights_are_the_checkpoints_tensors_by_name(folder):
    given = source(folder)
    assert given.config_json == json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors")
    read = {name: view.read().clone() for name, view in given.weights()}
    assert set(read) == set(stored)
    assert all(torch.equal(read[name], stored[name]) for name in stored)
    assert given.held_bytes == 0, "nothing was built"


def test_dummy_weights_have_the_same_names(folder):
    names = {name for name, _ in source(folder, load_format="dummy").weights()}
    assert names == {name for name, _ in source(folder).weights()}


def test_a_released_model_holds_nothing_and_its_copies_live(folder):
    given = source(folder)
    model = given.build(Mesh.alone())
    held = held_bytes(model)
    assert held == given.held_bytes > 0
    copy = model.embedding.weight.clone()
    assert given.release(model) == held
    assert held_bytes(model) == 0
    assert copy.abs().sum() > 0
    assert given.held_bytes == held, "they lie on the program's device now"
    assert [spec.head_dim for spec in given.attention_specs(MeshShape())] and model.attention, (
        "layouts and backends stay"
    )
