"""The plugin over the simulated NPU, where the suite does not look: attention of the documented sizes, devices without
streams, older and newer generations, faults as the runtime words them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from anychip.ops.reference import REFERENCE
from anychip.ops.table import resolve_platform_ops
from anychip.plugin_api import (
    NAMED,
    AttentionLayer,
    AttentionSpec,
    BatchView,
    LinearPart,
    LinearSpec,
    MoESpec,
    PlatformContext,
    ProbeResult,
    Recorder,
    ShapeKey,
    Unsupported,
)
from anychip_ascend import MANIFEST
from anychip_ascend.options import AscendOptions

pytestmark = pytest.mark.simulated

SIZE, ROWS, PAGES, BLOCKS = 128, 3, 2, 12
GQA = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16", kv_dtype="bfloat16")
BETWEEN_TWO_WAYS = 2.0**-6
"""Of outputs near one, in bfloat16: the reference and the op round each once, from sums in float32."""


@pytest.fixture
def opened(monkeypatch):
    """Opens platforms: `streams` is how many the chip has; options as --device-opt."""
    from anychip_npu_simulator.install import install

    install()
    from anychip_ascend.platform import AscendPlatform

    platforms: list[Any] = []

    def open_(*, streams: int | None = None, **options: Any) -> Any:
        if streams is not None:
            monkeypatch.setenv("NPU_SIMULATOR_STREAMS", str(streams))
        platforms.append(
            AscendPlatform(
                PlatformContext(
                    manifest=MANIFEST, device_indexes=(0,), options=AscendOptions(**options), probe=ProbeResult(),
                    reference=REFERENCE,
                )
            )
        )  # fmt: skip
        return platforms[-1]

    yield open_
    for platform in platforms:
        platform.close("tested")


def batch(lengths: list[int], queries: list[int], *, rows: int | None = None) -> tuple[BatchView, ShapeKey]:
    """Rows at blocks of their own, padded to `rows` rows of one token each."""
    real, tokens = len(lengths), sum(queries)
    rows = rows or real
    padded = tokens + rows - real
    table, slots = np.zeros((rows, PAGES), np.int32), np.full(padded, -1, np.int32)
    starts, seq_lens, at = np.zeros(rows + 1, np.int32), np.zeros(rows, np.int32), 0
    for row in range(rows):
        count, length = (queries[row], lengths[row]) if row < real else (1, 1)
        if row < real:
            table[row] = [1 + row * PAGES + page for page in range(PAGES)]
            place = np.arange(length - count, length)
            slots[at : at + count] = table[row][place // SIZE] * SIZE + place % SIZE
        at += count
        starts[row + 1], seq_lens[row] = at, length
    arrays = {"query_start": starts, "seq_lens": seq_lens, "block_table": table, "slot_mapping": slots}
    view = BatchView(
        **{name: torch.from_numpy(array).npu() for name, array in arrays.items()},
        positions=torch.zeros(padded, dtype=torch.int32).npu(), num_reqs=rows, num_tokens=padded,
        max_query_len=max(queries), block_size=SIZE, host_query_lens=np.asarray(queries, np.int32),
        host_seq_lens=np.asarray(lengths, np.int32), host_exact=True, host_slot_mapping=slots[:tokens].copy(),
    )  # fmt: skip
    key = ShapeKey(
        num_tokens=padded, num_reqs=rows, num_samples=rows, max_query_len=max(queries), num_pages=PAGES
    )  # fmt: skip
    return view, key


class Layer:
    """One attention layer of a platform over a pool of its own, filled the same for each."""

    def __init__(self, platform: Any, spec: AttentionSpec) -> None:
        self.platform, self.spec, self.backend = platform, spec, platform.attention(spec)
        draws = torch.Generator().manual_seed(5)
        raw = platform.empty((BLOCKS * self.backend.kv_layout().page_bytes(SIZE),), "uint8", "kv")
        self.cache = self.backend.make_cache(raw, BLOCKS, SIZE)
        shape = (BLOCKS, 2, SIZE, spec.num_kv_heads, spec.head_dim)
        pages = torch.randn(shape, generator=draws).to(torch.bfloat16).npu()
        self._pages = pages
        self.refill()
        sinks = torch.randn(spec.num_heads, generator=draws).npu() if spec.sinks else None
        ops = resolve_platform_ops(platform).ops
        self.layer = AttentionLayer(index=0, scale=spec.head_dim**-0.5, ops=ops, sinks=sinks)

    def refill(self) -> None:
        self.cache = self.backend.import_blocks(self.cache, list(range(BLOCKS)), self._pages)

    def inputs(self, tokens: int) -> list[torch.Tensor]:
        draws, spec = torch.Generator().manual_seed(tokens), self.spec
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        return [torch.randn(tokens, count, spec.head_dim, generator=draws).to(torch.bfloat16).npu() for count in heads]

    def run(self, view: BatchView, key: ShapeKey) -> torch.Tensor:
        plan = self.backend.plan(view, key, group=0)
        return self.backend.forward(*self.inputs(view.num_tokens), self.cache, plan, self.layer)[0].cpu().float()


DOCUMENTED = [
    {}, {"window": 40}, {"sinks": True}, {"sinks": True, "window": 150}, {"num_heads": 2},
    {"num_heads": 2, "window": 3},
]  # fmt: skip


@pytest.mark.parametrize("changes", DOCUMENTED, ids=str)
def test_the_fused_op_gives_what_the_reference_gives(opened, changes):
    spec = dataclasses.replace(GQA, **changes)
    fused, plain = Layer(opened(), spec), Layer(opened(attention="plain"), spec)
    assert "npu_fused_infer" in fused.backend.name and "reference" in plain.backend.name
    for lengths, queries in (([5, 200, 129], [5, 1, 3]), ([1, 128, 256], [1, 1, 1]), ([250], [120])):
        view, key = batch(lengths, queries)
        assert (fused.run(view, key) - plain.run(view, key)).abs().max() < BETWEEN_TWO_WAYS
    kept = [layer.backend.export_blocks(layer.cache, list(range(BLOCKS))).cpu() for layer in (fused, plain)]
    assert torch.equal(*kept), "both wrote the same bytes to the same places"


@pytest.mark.parametrize("changes", DOCUMENTED[:3], ids=str)
def test_replays_take_the_lengths_of_their_own_step(opened, changes):
    spec = dataclasses.replace(GQA, **changes)
    platform = opened()
    layer, plain = Layer(platform, spec), Layer(opened(attention="plain"), spec)
    graphs, recorder = platform.graph_capture(), Recorder()
    view, key = batch([1], [1], rows=ROWS)
    plan = layer.backend.plan(view, key, group=0, recorder=recorder)
    inputs = layer.inputs(ROWS)

    def step() -> torch.Tensor:
        return layer.backend.forward(*inputs, layer.cache, plan, layer.layer)[0]

    handle = graphs.capture(step, key, recorder=recorder)
    assert not any("eagerly" in note for note in platform.notes) and len(recorder.renewals) == 1
    for lengths in ([130, 7, 256], [64], [255, 1]):
        fresh, _ = batch(lengths, [1] * len(lengths), rows=ROWS)
        layer.refill()
        plain.refill()
        for name in ("block_table", "slot_mapping", "seq_lens", "query_start"):
            getattr(view, name).copy_(getattr(fresh, name))
        now = dataclasses.replace(fresh, **{name: getattr(view, name) for name in ("block_table", "slot_mapping")})
        renewed = layer.backend.plan(now, key, group=0, into=plan)
        rows = len(lengths)
        result = graphs.run(handle, [renewed]).cpu().float()[:rows]
        assert (result - plain.run(fresh, key)[:rows]).abs().max() < BETWEEN_TWO_WAYS


def test_without_streams_steps_run_eagerly_and_the_reason_is_noted(opened):
    platform = opened(streams=40)
    layer, graphs, recorder = Layer(platform, GQA), platform.graph_capture(), Recorder()
    view, key = batch([9, 9], [1, 1])
    plan = layer.backend.plan(view, key, group=0, recorder=recorder)
    inputs = layer.inputs(2)
    handle = graphs.capture(
        lambda: layer.backend.forward(*inputs, layer.cache, plan, layer.layer)[0], key, recorder=recorder
    )
    assert any("run eagerly" in note and "streams" in note for note in platform.notes)
    assert graphs.run(handle, [plan]).shape == inputs[0].shape


def test_what_reads_on_the_host_is_kept_out_of_graphs(opened):
    platform = opened()
    layer = Layer(platform, dataclasses.replace(GQA, softcap=30.0))
    view, key = batch([9], [1])
    plan, inputs = layer.backend.plan(view, key, group=0), layer.inputs(1)
    platform.graph_capture().capture(
        lambda: layer.backend.forward(*inputs, layer.cache, plan, layer.layer)[0], key
    )  # fmt: skip
    assert any("soft cap" in note and "eagerly" in note for note in platform.notes)


# -- generations ----------------------------------------------------------------------------------------------


OPEN = """
from anychip_npu_simulator.install import install; install()
from anychip.ops.reference import REFERENCE
from anychip.plugin_api import AttentionSpec, LinearPart, LinearSpec, PlatformContext, ProbeResult, StepLimits
from anychip_ascend import MANIFEST
from anychip_ascend.platform import AscendPlatform
platform = AscendPlatform(PlatformContext(
    manifest=MANIFEST, device_indexes=(0,), options=MANIFEST.options(), probe=ProbeResult(), reference=REFERENCE,
))
limits = StepLimits(max_num_tokens=512, max_num_reqs=256, max_model_len=256, max_slots=256, max_pages=(2,))
spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128, dtype="float16", kv_dtype="float16")
part = LinearPart(name="p", offset=0, rows=32)
linear = LinearSpec(in_features=64, out_features=32, parts=(part,), dtype="float16")
"""


def told(code: str, soc: str) -> list[str]:
    """What a program prints, of a platform on another chip: the wheel asks for the chip once a process."""
    environment = {**os.environ, "NPU_SIMULATOR_SOC": soc, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", OPEN + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith("Warning")]  # the wheel prints one


def test_a_310p_runs_on_the_reference_and_says_so():
    code = """
print(platform.generation.name, platform.graph_capture().level.name, "bfloat16" in platform.capabilities.dtypes)
print(sorted(platform.ops()))
print(platform.attention(spec).name)
print(*platform.notes, sep=" | ")
"""
    first, ops, attention, notes = told(code, "Ascend310P3")
    assert first == "310P NONE False" and attention == "ascend reference"
    assert "rotary" not in ops and "gated_activation" not in ops and "rms_norm" in ops
    assert "310P has no npu_fused_infer_attention_score, in its place: core's reference" in notes


def test_a_950_leaves_weights_as_they_are_and_captures_few_graphs():
    code = """
print(platform.linear(linear).name)
print("fp8" in platform.capabilities.quantization, len(platform.shape_policy(limits).keys()))
"""
    assert told(code, "Ascend950PR_9589") == ["ascend matmul", "True 4"]


def test_an_unknown_chip_is_refused_by_name(opened, monkeypatch):
    from anychip_ascend import platform as module

    platform = opened()
    monkeypatch.setattr(module.device_module(), "get_device_name", lambda index: "Ascend310B1")
    with pytest.raises(Unsupported, match="'Ascend310B1' is of no generation.*910B"):
        platform.find_generation()


# -- weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "int8-w8a8"])
def test_a_part_is_rewritten_within_fractal_nz(opened, name):
    platform, rows, columns = opened(), 64, 96
    scheme = None if name is None else NAMED[name]
    parts = (LinearPart(name="a", offset=0, rows=rows), LinearPart(name="b", offset=rows, rows=rows))
    spec = LinearSpec(in_features=columns, out_features=2 * rows, parts=parts, dtype="float16", scheme=scheme)
    kernel, draws = platform.linear(spec), torch.Generator().manual_seed(0)
    assert "FRACTAL_NZ" in kernel.name
    values = [torch.randint(-100, 100, (rows, columns), generator=draws).to(torch.int8) for _ in range(3)]
    if scheme is None:
        values = [value.to(torch.float16) / 64 for value in values]
    packed = kernel.begin()
    for part, value in zip(("a", "b"), values, strict=False):
        kernel.load(packed, part, value)
        if scheme is not None:
            kernel.load(packed, f"{part}.scale", torch.full((rows,), 1 / 64))
    packed = kernel.finish(packed)
    where = packed.weight.data_ptr()
    kernel.update(packed, "b", values[2])
    assert packed.weight.data_ptr() == where, "graphs see the new weights"
    x = torch.randint(-3, 4, (5, columns), generator=draws).to(torch.float16)
    expected = x.float() @ torch.cat((values[0], values[2])).float().T / (1 if scheme is None else 64)
    error = (kernel.apply(x.npu(), packed).cpu().float() - expected).abs().max()
    assert error < (0.05 if scheme is None else 0.02) * expected.abs().max()


def test_experts_elsewhere_contribute_nothing(opened):
    """Rows that no group of the product has hold NaN in the simulator: none may come through."""
    platform = opened()
    spec = MoESpec(num_experts=4, top_k=2, hidden_size=32, intermediate_size=16, dtype="float16", num_local_experts=1)
    kernel, draws = platform.moe(spec), torch.Generator().manual_seed(0)
    packed = kernel.begin()
    for part, shape in (("gate", (16, 32)), ("up", (16, 32)), ("down", (32, 16))):
        kernel.load(packed, 0, part, torch.randn(shape, generator=draws).to(torch.float16))
    x = torch.randn(6, 32, generator=draws).to(torch.float16).npu()
    routing = kernel.route(torch.randn(6, 4, generator=draws).npu())
    none = kernel.experts(x, routing, packed, expert_map=torch.tensor([-1, -1, -1, -1]).npu())
    assert not none.cpu().any()
    some = kernel.experts(x, routing, packed, expert_map=torch.tensor([-1, 0, -1, -1]).npu()).cpu()
    picked = (routing.expert_ids.cpu() == 1).any(dim=1)
    assert some[picked].abs().sum() > 0 and not some[~picked].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_experts_of_int8_are_near_what_their_weights_stand_for(opened, dtype):
    """Against the reference's own rounding of activations, which is the same: by row, to the nearest."""
    platform, kind = opened(), getattr(torch, dtype)
    spec = MoESpec(num_experts=4, top_k=2, hidden_size=64, intermediate_size=32, dtype=dtype, scheme=NAMED["int8-w8a8"])
    kernel, plain = platform.moe(spec), REFERENCE.moe(spec, platform)
    assert "int8" in kernel.name
    packs = [each.begin() for each in (kernel, plain)]
    draws = torch.Generator().manual_seed(3)
    for expert in range(4):
        for part, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32))):
            values = torch.randint(-127, 128, shape, generator=draws).to(torch.int8)
            scales = torch.rand(shape[0], generator=draws).to(kind).float() / 500  # exact in the op's own dtype
            for each, packed in zip((kernel, plain), packs, strict=True):
                each.load(packed, expert, part, values)
                each.load(packed, expert, f"{part}.scale", scales)
    x, logits = torch.randn(9, 64, generator=draws).to(kind).npu(), torch.randn(9, 4, generator=draws).npu()
    mine, theirs = (
        each.experts(x, each.route(logits), each.finish(packed)).cpu().float()
        for each, packed in zip((kernel, plain), packs, strict=True)
    )
    assert (mine - theirs).abs().max() < 0.03 * theirs.abs().max()


# -- faults ---------------------------------------------------------------------------------------------------


def test_the_runtimes_own_words_for_too_much_memory_are_explained(opened):
    platform = opened()
    with pytest.raises(RuntimeError) as raised:
        platform.empty((2**42,), "uint8", "weights")
    fault = platform.explain(raised.value)
    assert fault is not None and fault.kind == "out_of_memory" and "GiB free" in str(fault)


def test_a_refused_call_names_the_op(opened):
    platform = opened()
    with pytest.raises(RuntimeError, match="npu_rms_norm"):
        torch.ops.npu.npu_rms_norm(torch.ones(2, 4).npu(), torch.ones(3).npu(), 1e-6)
    assert platform.explain(ValueError("not the device's")) is None


def test_nothing_makes_cuda_mean_npu(opened):
    opened()
    assert "torch_npu.contrib.transfer_to_npu" not in sys.modules
    assert torch.cuda.__name__ == "torch.cuda"
