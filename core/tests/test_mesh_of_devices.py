"""A model over two axes: every device reads its own slices, as its specs say, and no others."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from anychip import LLM, SamplingParams
from anychip.config import EngineConfig
from anychip.errors import InvalidOverride
from anychip.model_config import load_model_config
from anychip.plugin_api import KV_HEADS, Communicator, Mesh, MeshShape, held
from anychip.weights.files import FileView
from anychip.worker.model_source import CheckpointSource
from anychip_conformance.device import open_device
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.fakes.spmd import SpmdPlatform

SHAPE = MeshShape(ep=2, tp=2)


class Absent(Communicator):
    name = "absent"


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3-moe")
    make_checkpoint("qwen3-moe", path)
    return path


@pytest.fixture(scope="module")
def source(experts) -> CheckpointSource:
    device = open_device("fake-mesh", {})
    config = EngineConfig(model=str(experts), device="fake-mesh", dtype="float32")
    return CheckpointSource(
        config=config,
        model=load_model_config(str(experts)),
        platform=device.platform,
        ops=device.ops,
        contributed={},
    )


def ranks(shape: MeshShape = SHAPE) -> list[Mesh]:
    return [Mesh(shape, rank, Absent) for rank in range(shape.size)]


def test_weights_of_all_ranks_join_to_the_checkpoints_as_their_specs_say(source, experts):
    stored = load_file(experts / "model.safetensors")
    meshes = ranks()
    models = [source.build(mesh) for mesh in meshes]
    attention = [model.layers[0].attention for model in models]
    for linear, part, name in (
        ("qkv", 0, "q_proj"),
        ("qkv", 1, "k_proj"),
        ("qkv", 2, "v_proj"),
        ("output", 0, "o_proj"),
    ):
        whole = stored[f"model.layers.0.self_attn.{name}.weight"]
        joined = torch.full_like(whole, torch.nan)
        for mesh, layer in zip(meshes, attention, strict=True):
            product = getattr(layer, linear)
            given = product.kernel.spec.parts[part]
            rows, columns = held(whole.shape, given.placed, mesh)
            packed = product.packed.weight[given.offset : given.offset + given.rows]
            joined[slice(*rows.bounds), slice(*columns.bounds)] = packed
        assert torch.equal(joined, whole), name


def test_every_rank_holds_its_experts_and_its_features_of_them(source, experts):
    stored = load_file(experts / "model.safetensors")
    for mesh in ranks():
        moe = source.build(mesh).layers[0].mlp
        spec = moe.kernel.spec
        extents = (spec.num_experts, spec.intermediate_size * SHAPE.tp, spec.hidden_size)
        here, features, _ = held(extents, spec.placed, mesh)
        assert here.count == spec.num_held == len(moe.packed.down) == spec.num_experts // 2
        assert moe.expert_map.tolist() == [
            place - here.start if place in range(*here.bounds) else -1 for place in range(spec.num_experts)
        ]
        for place, expert in enumerate(range(*here.bounds)):
            down = stored[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"]
            assert torch.equal(moe.packed.down[place], down[:, slice(*features.bounds)])


def test_experts_of_other_ranks_are_not_read(source, monkeypatch):
    read = []
    original = FileView.read

    def recorded(self, *bounds):
        read.append(self.source)
        return original(self, *bounds)

    monkeypatch.setattr(FileView, "read", recorded)
    count = source.build(ranks()[0]).layers[0].mlp.spec.num_experts
    seen = {text.partition("experts.")[2].partition(".")[0] for text in read if "experts." in text}
    assert seen == {str(expert) for expert in range(count // 2)}


@pytest.mark.parametrize(("shape", "heads"), [(SHAPE, 1), (MeshShape(tp=4), 1), (MeshShape(ep=4), 2), (MeshShape(), 2)])
def test_pages_say_which_heads_a_rank_holds(source, shape, heads):
    spec = source.attention_specs(shape)[0]
    assert spec.num_kv_heads == heads
    whole = source.model.num_kv_heads
    found = [held((2, 16, whole, spec.head_dim), spec.pages, mesh)[KV_HEADS] for mesh in ranks(shape)]
    assert {span.count for span in found} == {heads}
    assert {head for span in found for head in range(*span.bounds)} == set(range(whole))


def test_a_mesh_of_devices_gives_the_tokens_of_one_device(experts):
    answers = []
    for device in ("fake-hostlen", "fake-mesh"):
        settings = {"device": device, "dtype": "float32", "max_model_len": 64, "num_kv_blocks": 32}
        with LLM(str(experts), skip_tokenizer=True, **settings) as llm:
            outputs = llm.generate([[5, 6, 7], [9] * 20], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
            answers.append([output.outputs[0].token_ids for output in outputs])
    assert answers[0] == answers[1]


def test_a_mesh_of_other_devices_than_the_process_drives_is_refused(monkeypatch):
    monkeypatch.setattr(SpmdPlatform, "device_mesh", MeshShape(ep=2, tp=4))
    with pytest.raises(
        InvalidOverride, match=r"device_mesh is ep 2 x tp 4, 8 in all, .* drives 4; .* the Decision of negotiate"
    ):
        open_device("fake-spmd", {})
