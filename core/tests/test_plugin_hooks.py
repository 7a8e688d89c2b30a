"""A platform whose method raises, whichever it is and however deep, is named by the worker that called it."""

from __future__ import annotations

import inspect
import json
import sys
from types import ModuleType

import msgspec
import numpy as np
import pytest

from anychip.config import EngineConfig
from anychip.errors import InvalidOverride, PluginFailed, PluginImportFailed
from anychip.plugin_api import API_VERSION, DeviceInfo, Platform, PlatformManifest, ProbeResult
from anychip.process_specs import WorkerSpec
from anychip.registry.plugins import Plugins
from anychip.step_messages import LateInputs, NewRow, StepDecision
from anychip.worker.worker import Worker

METHODS = [name for name, _ in inspect.getmembers(Platform, inspect.isfunction) if not name.startswith("_")]
ELSEWHERE = {"synchronize", "profiler", "health", "sleep", "wake", "check", "explain"}
"""Asked by tools, or to look after a device; a platform that cannot explain an error is no obstacle to another."""
ANOTHER_MODEL = {"moe", "latent", "state", "encoder", "keep_weights", "restore_weights"}
"""Asked for experts, for layers that keep latent rows or states, and for weights that lie in files."""
PACKAGE = "anychip-stranger"
PROBE = ProbeResult(devices=(DeviceInfo(index=0, name="x"),))
SOURCE = """
from anychip.plugin_api import Communicator, GraphCapture, Platform, ShapePolicy, StepProgram

class Honest(Platform):
    def kv_budget(self, profile):
        return 2**22

class Raising(Honest):
    def {method}(self, *args, **kwargs):
        raise RuntimeError("boom")
"""
PARTS = {
    "a shape policy's keys": (
        "class Keys(ShapePolicy):\n    def keys(self):\n        return 1 / 0\n"
        "class Raising(Honest):\n    def shape_policy(self, limits):\n        return Keys()\n",
        "Keys.keys",
    ),
    "a communicator": (
        "class Alone(Communicator):\n    def __init__(self, group):\n        1 / 0\n"
        "class Raising(Honest):\n    def communicator(self, group):\n        return Alone(group)\n",
        "Raising.communicator",
    ),
    "an op": (
        "class Raising(Honest):\n    def ops(self):\n        from anychip.plugin_api import op_override\n"
        "        @op_override('rms_norm', version=1)\n"
        "        def rms_norm(*, x, weight, eps, unit_offset=False):\n            return 1 / 0\n"
        "        return {'rms_norm': rms_norm}\n",
        "rms_norm",
    ),
    "graphs": (
        "class Graphs(GraphCapture):\n    def reserve(self, keys, pieces=()):\n        return 1 / 0\n"
        "class Raising(Honest):\n    def graph_capture(self):\n        return Graphs()\n",
        "Graphs.reserve",
    ),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 16,
    "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
}  # fmt: skip


def manifest(**more: object) -> PlatformManifest:
    return PlatformManifest(
        name="stranger",
        package=PACKAGE,
        api_version=API_VERSION,
        summary="",
        probe="stranger_platform:probe",
        platform="stranger_platform:Raising",
        **more,  # type: ignore[arg-type]
    )


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a worker over a platform module's text."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def started(text: str, *, world_size: int = 1, **more: object) -> Worker:
        module = ModuleType("stranger_platform")
        exec(compile(text, "<stranger_platform>", "exec"), module.__dict__)
        monkeypatch.setitem(sys.modules, "stranger_platform", module)
        plugins = Plugins(platforms={"stranger": manifest(**more)})
        monkeypatch.setattr("anychip.worker.worker.load_plugins", lambda: plugins)
        config = EngineConfig(model=str(tmp_path), load_format="dummy", max_num_seqs=2, max_num_batched_tokens=16)
        return Worker(
            WorkerSpec(
                config=config, device="stranger", device_indexes=(0,), rank=0, world_size=world_size, store="",
                folder=str(tmp_path), probe=msgspec.to_builtins(PROBE),
            )
        )  # fmt: skip

    return started


@pytest.mark.parametrize("method", METHODS)
def test_a_method_of_the_platform_that_raises_is_named(start, method):
    reached = False
    try:
        worker = start(SOURCE.format(method=method), world_size=2 if method == "communicator" else 1)
        step(worker)
        worker.close("tested")
    except PluginFailed as failed:
        reached = True
        assert f"{PACKAGE}: stranger_platform:Raising.{method} raised RuntimeError: boom; report" in str(failed)
    assert reached or method in ELSEWHERE | ANOTHER_MODEL, f"core never called {method}"


@pytest.mark.parametrize("part", PARTS)
def test_what_a_platform_makes_is_named_too(start, part):
    text, function = PARTS[part]
    with pytest.raises(PluginFailed, match=rf"^{PACKAGE}: stranger_platform:.*{function}.* raised ZeroDivisionError"):
        start(SOURCE.format(method="unused") + text, world_size=2 if part == "a communicator" else 1)


def step(worker: Worker) -> None:
    row = NewRow(
        slot=0, token_ids=np.array([3, 4], dtype=np.int32).tobytes(), num_prompt=2, num_computed=0, block_ids=[[1]],
        temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sample_index=0, logprobs=-1, score_from=2, score_top=0,
    )  # fmt: skip
    counts = np.array([2], dtype=np.int32).tobytes()
    worker.launch(
        StepDecision(
            step_id=1, slots=np.array([0], dtype=np.int32).tobytes(), num_tokens=counts, new_rows=[row],
            new_blocks=b"", finished_slots=[], copies=[], zeros=[],
        )
    )  # fmt: skip
    worker.sample(LateInputs(1, {})).fetch()


FETCHING = """
from anychip.plugin_api import Event

class Late(Event):
    def wait(self):
        raise OSError("the card has left the bus")

class Raising(Honest):
    def event(self):
        return Late() if self.serving else Event()
    serving = False
"""


def test_what_shows_when_a_result_is_fetched_is_named(start):
    worker = start(SOURCE.format(method="unused") + FETCHING)
    worker.platform.serving = True
    with pytest.raises(PluginFailed, match=r"Late.wait raised OSError: the card has left the bus"):
        step(worker)


def test_a_method_that_core_cannot_call_is_refused_as_the_platform_opens(start):
    text = SOURCE.format(method="unused") + "class Raising(Honest):\n    def shape_policy(self):\n        return None\n"
    with pytest.raises(InvalidOverride, match=r"core cannot call stranger_platform:Raising.shape_policy: too many"):
        start(text)


def test_a_platform_that_does_not_load_is_named(start):
    with pytest.raises(PluginImportFailed, match=f"^{PACKAGE}: importing stranger_platform:Raising raised"):
        start("Raised = None")


@pytest.mark.parametrize(
    ("seam", "method", "said"),
    [
        ("step", "unused", "seam='step', and Platform.step_program gave none"),
        ("torch", "step_program(self, model, kv, limits): return StepProgram()\n    def unused", "gave StepProgram"),
    ],
)
def test_a_seam_that_is_not_the_one_announced_is_refused(start, seam, method, said):
    with pytest.raises(InvalidOverride, match=said):
        start(SOURCE.format(method=method), seam=seam)
