"""What a step asks of a device, counted on one that holds nothing: torch's meta tensors, and a launcher that writes
launches down. A value that the host wanted to know in the middle of a step would fail there, for there is none."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anychip.config import EngineConfig
from anychip.model_config import load_model_config
from anychip.ops.reference import REFERENCE
from anychip.ops.table import resolve_ops
from anychip.plugin_api import (
    Capabilities,
    Communicator,
    PlatformContext,
    PlatformManifest,
    PluginOptions,
    ProbeResult,
)
from anychip.process_specs import WorkerSpec
from anychip.step_messages import LateInputs, NewRow, StepDecision
from anychip.worker.model_runner import ModelRunner
from anychip.worker.preparation import prepare
from anychip.worker.torch_program import TorchStepProgram
from anychip_triton.ahead import RecordingLauncher
from anychip_triton.graph import DecodeShapes
from anychip_triton.linear import EPILOGUES
from anychip_triton.platform import TritonPlatform
from anychip_triton.targets import TARGETS

VOCABULARY, ROWS = 1024, 24
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "torch_dtype": "bfloat16", "rope_theta": 10000.0,
}  # fmt: skip
MODELS = {
    "dense": COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "experts": COMMON | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "moe_intermediate_size": 128,
        "num_experts": 16, "num_experts_per_tok": 4, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "scaled embeddings": COMMON | {
        "architectures": ["GraniteForCausalLM"], "model_type": "granite", "embedding_multiplier": 12.1,
        "residual_multiplier": 0.3, "logits_scaling": 7.0, "attention_multiplier": 0.1,
    },
    "scaled and capped": COMMON | {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 64, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
        "layer_types": ["full_attention", "full_attention"],
    },
}  # fmt: skip


class Paper(TritonPlatform):
    capabilities = Capabilities(dtypes=frozenset({"bfloat16"}), epilogues=EPILOGUES)

    def __init__(self, context: PlatformContext) -> None:
        super().__init__(context)
        self.launch = RecordingLauncher(TARGETS["sm_90"])

    def find_target(self):
        return TARGETS["sm_90"]

    def device(self, index):
        return "meta"

    def shape_policy(self, limits):
        return DecodeShapes(limits)


_HOST_TENSORS = {"lift_fresh", "detach_"}
"""What torch does with a tensor that is made of the host's numbers: on a device, it is a copy that waits."""

_MULTIPLIERS = ("mul", "div")
"""Of families that scale embeddings, residual sums or logits."""


class Traffic(TorchDispatchMode):
    """Counts copies between host and device, and operations on the device."""

    def __init__(self):
        super().__init__()
        self.to_device, self.to_host, self.operations = 0, 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        places = [*args[1:], *kwargs.values()]
        place = next((torch.device(p).type for p in places if p in ("cpu", "meta") or isinstance(p, torch.device)), "")
        if args and isinstance(args[0], Tensor) and place not in ("", args[0].device.type):
            if place == "cpu":
                self.to_host += 1
                return torch.zeros(args[0].shape, dtype=args[0].dtype)
            self.to_device += 1
        if func.overloadpacket.__name__ == "copy_" and args[0].device != args[1].device:
            self.to_device += 1
        result = func(*args, **kwargs)
        on_device = isinstance(result, Tensor) and result.device.type == "meta"
        if on_device and func.overloadpacket.__name__ in _HOST_TENSORS:
            self.to_device += 1
        if on_device and not func.is_view and "empty" not in func.name():
            self.operations[func.overloadpacket.__name__] += 1
        return result


@pytest.fixture(params=MODELS)
def steps(request, tmp_path):
    """A runner of a model that is all on paper, and its recording launcher; rows hold eight tokens each."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS[request.param]))
    manifest = PlatformManifest(name="paper", package="p", api_version="0.2", summary="", probe="", platform="")
    platform = Paper(
        PlatformContext(
            manifest=manifest, device_indexes=(0,), options=PluginOptions(), probe=ProbeResult(), reference=REFERENCE
        )
    )
    config = EngineConfig(model=str(tmp_path), load_format="dummy", skip_tokenizer=True, max_num_seqs=32)
    spec = WorkerSpec(
        config=config, device="paper", device_indexes=(0,), rank=0, world_size=1, store="", folder="", probe={}
    )
    ops = resolve_ops("paper", platform.ops(), require_native=False)
    prepared = prepare(spec, load_model_config(str(tmp_path)), platform, ops, {})
    mesh = prepared.mesh(spec, Communicator)
    model = prepared.source.build(mesh)
    program = TorchStepProgram(
        platform=platform, model=model, ops=ops.ops, kv=prepared.kv, limits=prepared.limits,
        communicators=mesh.opened,
    )  # fmt: skip
    runner = ModelRunner(program, prepared.new_batch(), program.initial_state(64))
    with Traffic():
        take(runner, 0, 8, [new_row(slot) for slot in range(ROWS)])
    return runner, platform.launch


def new_row(slot: int, **edits) -> NewRow:
    return NewRow(
        slot=slot, token_ids=np.arange(8, dtype=np.int32).tobytes(), num_prompt=8, num_computed=0,
        block_ids=[[1 + slot]], temperature=1.0, top_k=50, top_p=0.9, min_p=0.0, seed=0, sample_index=0, logprobs=-1,
        score_from=8, score_top=0, **edits,
    )  # fmt: skip


def take(runner: ModelRunner, number: int, count: int, new_rows=(), late: LateInputs | None = None):
    """A step of all rows, `count` tokens each."""
    runner.launch(
        StepDecision(
            step_id=number, slots=np.arange(ROWS, dtype=np.int32).tobytes(),
            num_tokens=np.full(ROWS, count, dtype=np.int32).tobytes(), new_rows=list(new_rows), new_blocks=b"",
            finished_slots=[], copies=[], zeros=[],
        )
    )  # fmt: skip
    return runner.sample(late or LateInputs(number, {}))


def test_a_step_is_one_copy_to_the_device_and_one_back(steps):
    runner, launch = steps
    for number in (1, 2):
        launch.launches.clear()
        with Traffic() as traffic:
            take(runner, number, 1).fetch()
        assert (traffic.to_device, traffic.to_host) == (1, 1)
        assert {"paged_attention", "rotate_and_write", "rms_norm", "embedding", "truncate", "draw"} <= names(launch)
    # Beside products: ids that only the device knows, and the sampled ones kept. None of them is a layer's.
    others = Counter({name: n for name, n in traffic.operations.items() if name not in ("linear", *_MULTIPLIERS)})
    assert others.total() <= 8 and not {"argsort", "sort", "scatter_add"} & others.keys(), others


def test_masks_are_one_copy_more(steps):
    runner, launch = steps
    mask = np.full(VOCABULARY // 32, -1, dtype=np.int32).tobytes()
    with Traffic() as traffic:
        take(runner, 1, 1, late=LateInputs(1, {0: mask})).fetch()
    assert (traffic.to_device, traffic.to_host) == (2, 1)
    assert "mask_tokens" in names(launch)


def test_penalties_and_biases_are_no_copy_more(steps):
    runner, launch = steps
    rows = [new_row(slot, frequency_penalty=0.5, logit_bias={3: 1.0}) for slot in range(ROWS)]
    with Traffic():
        take(runner, 1, 8, rows)
    launch.launches.clear()
    with Traffic() as traffic:
        take(runner, 2, 1).fetch()
    assert (traffic.to_device, traffic.to_host) == (1, 1)
    assert {"edit_logits", "add_biases", "count_tokens"} <= names(launch)


def names(launch: RecordingLauncher) -> set[str]:
    return {each.kernel.__name__ for each in launch.launches}
