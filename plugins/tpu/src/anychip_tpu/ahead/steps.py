"""A model's step programs for a slice: traced without weights, compiled, and estimated."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

from anychip.plugin_api import AttentionSpec, DeviceInfo, PlatformManifest, ProbeResult, ShapeKey, Unsupported
from anychip_tpu.ahead.compiler import CompileFailed, compile_text
from anychip_tpu.ahead.estimate import Load, attention_load, estimate
from anychip_tpu.ahead.fit import ModelSize, problems, usable
from anychip_tpu.ahead.report import Bucket, SliceReport
from anychip_tpu.ahead.topology import Topology

_PLATFORM = "anychip_tpu.ahead.platform:AheadPlatform"


def prepare_process(topology: Topology) -> None:
    """Before torch_xla is imported: it counts the devices of its mesh as it starts."""
    os.environ["PJRT_DEVICE"] = "CPU"
    os.environ["CPU_NUM_DEVICES"] = str(topology.num_devices)


def compile_steps(
    manifest: PlatformManifest,
    settings: Mapping[str, Any],
    topology: Topology,
    *,
    context: int,
    choose: Callable[[Sequence[ShapeKey]], Sequence[ShapeKey]],
    got_on: Callable[[str], None] = lambda doing: None,
) -> SliceReport:
    """`settings` are fields of EngineConfig; `choose` picks the buckets to compile; `context` is the past of each row
    that estimates assume; `got_on` hears what is done. prepare_process comes before."""
    import torch

    from anychip.weightless import described, weightless
    from anychip_tpu.compiled import Compiler

    chip, devices = topology.generation, topology.num_devices
    report = SliceReport(topology=topology, libtpu=metadata.version("libtpu"), context=context)
    model = described(settings)
    size = ModelSize(weight_bytes=0, request_bytes=0, num_heads=model.num_heads, num_kv_heads=model.num_kv_heads)
    if found_wrong := problems(size, topology):
        return replace(report, problems=found_wrong)
    probe = ProbeResult(
        devices=tuple(
            DeviceInfo(index=i, name=f"TPU {chip.name}", detail=str(topology), total_memory=chip.hbm_bytes_per_device)
            for i in range(devices)
        )
    )
    opened = replace(manifest, platform=_PLATFORM, requirements=())
    found = weightless(settings, opened, probe)
    got_on("the model is built without weights")
    program = found.platform.step_program(found.source, found.kv, found.limits)
    block_size, num_layers = found.kv.block_sizes[0], len(program.model.attention)
    # Each layer has arrays of its own, so blocks take more than the plan counts where there are several groups.
    block_bytes = found.kv.page_bytes * num_layers
    size = replace(
        size,
        weight_bytes=found.source.held_bytes,
        request_bytes=block_bytes * max(found.limits.max_pages) * min(devices, model.num_kv_heads),
    )
    weights = size.weight_bytes / devices
    report = replace(report, problems=problems(size, topology), weight_bytes=weights, block_size=block_size)
    if report.problems:
        return report
    keys = choose(found.policy.keys())
    activations = max(program.memory(key) for key in keys)
    free = usable(chip) - weights - found.kept_bytes - activations
    num_blocks = max(int(free // block_bytes), max(found.limits.max_pages) + 1)
    specs = [spec for spec in (found.kv.specs[group] for group in found.kv.layer_groups) if _is_attention(spec)]
    buckets = []
    with torch.no_grad():
        state = program.initial_state(num_blocks)
        compiler = Compiler(found.platform.runtime, program.model, found.source.ops, found.kv, found.limits)
        for key in keys:
            got_on(f"{key.num_tokens} tokens in {key.num_reqs} rows")
            try:
                traced = compiler.forward(state, key)
                compiled = compile_text(traced.text, topology, traced.donated)
            except (CompileFailed, Unsupported) as error:
                buckets.append(Bucket(key=key, reason=str(error)))
                continue
            kv_bytes, flops = attention_load(specs, key, context, getattr(torch, specs[0].kv_dtype).itemsize)
            load = Load(weight_bytes=_read(weights, model, key), kv_bytes=kv_bytes, attention_flops=flops)
            buckets.append(
                Bucket(key=key, compiled=compiled, estimate=estimate(compiled, load, topology, found.source.dtype))
            )
    return replace(report, num_blocks=num_blocks, buckets=buckets)


def _is_attention(spec: object) -> bool:
    return isinstance(spec, AttentionSpec)


def _read(weights: float, model: Any, key: ShapeKey) -> float:
    """Bytes of weights that a step reads: of experts, those that some token picks, if tokens pick evenly."""
    raw = model.raw
    num_experts = raw.get("num_experts") or raw.get("num_local_experts") or 0
    if not num_experts:
        return weights
    width = raw.get("moe_intermediate_size") or raw["intermediate_size"]
    share = 3 * num_experts * width * model.hidden_size
    dense = 2 * model.vocab_size * model.hidden_size / model.num_layers
    attention = 2 * model.hidden_size * model.head_dim * (model.num_heads + model.num_kv_heads)
    of_experts = share / (share + dense + attention)
    untouched = (1 - raw["num_experts_per_tok"] / num_experts) ** key.num_tokens
    return weights * (1 - of_experts * untouched)
