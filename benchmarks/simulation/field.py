"""What the simulator says of deployments whose figures are known, beside those figures.

python benchmarks/simulation/field.py [--output benchmarks/results/simulation.json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from anychip.bench.report import percentiles, write
from anychip.model_config import load_model_config
from anychip.simulate.accelerator import read_accelerator
from anychip.simulate.costs import RooflineCosts
from anychip.simulate.layout import Layout, cache_tokens, check_layout
from anychip.simulate.run import Limits, Outcome, Simulation
from anychip.simulate.shape import model_shape
from anychip.simulate.traffic import Traffic

HERE = Path(__file__).parent
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    },
    "Llama-3.1-8B": {
        **_LLAMA,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 14336,
    },
    "Llama-3.1-70B": {
        **_LLAMA,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "intermediate_size": 28672,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
    "DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "vocab_size": 129280,
        "max_position_embeddings": 163840,
    },
}
H200_VLLM = "vLLM 0.26.0, measured on one H200"
LMSYS = "SGLang, 96 H100: lmsys.org/blog/2025-05-05-large-scale-ep"
SUBSTRATUS = "vLLM, 8 L4: substratus.ai/blog/benchmarking-llama-3.1-70b-on-l4"


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """`figure` is one of the result's; `known` is what somebody measured, None: nobody has published one."""

    name: str
    shape: str
    accelerator: str
    layout: Layout
    traffic: Traffic
    figure: str
    known: float | None
    source: str
    weights: str = "bfloat16"
    max_rows: int = 256
    max_tokens: int = 8192
    overlap: float | None = None
    """Of communication, in place of the accelerator's."""


def _h200(shape: str, bs1: float, bs8: float, bs128: float, batch: float, prefill: float) -> list[Deployment]:
    def one(name: str, traffic: Traffic, figure: str, known: float) -> Deployment:
        return Deployment(
            name=f"{shape}, {name}",
            shape=shape,
            accelerator="h200",
            layout=Layout(),
            traffic=traffic,
            figure=figure,
            known=known,
            source=H200_VLLM,
        )

    batch_traffic = Traffic(num_requests=512, input_len=512, output_len=160, spread=0.5)
    return [
        one("1 stream", Traffic(num_requests=1, input_len=1024, output_len=129), "ms between tokens", bs1),
        one("8 streams", Traffic(num_requests=8, input_len=512, output_len=129), "ms between tokens", bs8),
        one("128 streams", Traffic(num_requests=128, input_len=512, output_len=129), "ms of a decoding step", bs128),
        one("512 requests", batch_traffic, "output tok/s", batch),
        one("8 prompts of 8,192", Traffic(num_requests=8, input_len=8192, output_len=1), "input tok/s", prefill),
    ]


def _tp8(name: str, layout: Layout) -> Deployment:
    """Nobody has published figures of this deployment that could be found."""
    return Deployment(
        name=name,
        shape="Llama-3.1-70B",
        accelerator="h100",
        layout=layout,
        traffic=Traffic(num_requests=512, input_len=1024, output_len=256),
        figure="output tok/s",
        known=None,
        source="",
    )


def _lanes(name: str, ranks: int, phase: str, figure: str, known: float | None, **more: Any) -> Deployment:
    each = 256 if phase == "decode" else 32
    return Deployment(
        name=name,
        shape="DeepSeek-V3",
        accelerator="h100",
        layout=Layout(dp=ranks, spread_experts=True),
        traffic=Traffic(num_requests=each * ranks, input_len=2000, output_len=100, phase=phase),  # type: ignore[arg-type]
        figure=figure,
        known=known,
        source="" if known is None else LMSYS,
        weights="fp8",
        max_tokens=1_000_000 if phase == "decode" else 16384,
        **more,
    )


def _l4(name: str, layout: Layout, known: float) -> Deployment:
    """ShareGPT's lengths are taken as 230 and 200 tokens, which give the published ratio of input and output."""
    return Deployment(
        name=name,
        shape="Llama-3.1-70B",
        accelerator="l4",
        layout=layout,
        traffic=Traffic(num_requests=1000, input_len=230, output_len=175, spread=0.8),
        figure="output tok/s",
        known=known,
        source=SUBSTRATUS,
        weights="fp8",
        max_rows=512,
    )


DEPLOYMENTS = [
    *_h200("Qwen2.5-0.5B", 1.46, 1.90, 4.02, 36578, 381633),
    *_h200("Llama-3.1-8B", 4.92, 5.28, 9.11, 7748, 37950),
    *_h200("Qwen3-30B-A3B", 4.15, 9.14, 20.2, 8073, 52897),
    _tp8("Llama-3.1-70B, tp 8", Layout(tp=8)),
    _tp8("Llama-3.1-70B, tp 8, 2 stages", Layout(tp=8, pp=2)),
    _l4("Llama-3.1-70B, tp 2, 4 stages", Layout(tp=2, pp=4), 307.6),
    _l4("Llama-3.1-70B, tp 4, 2 stages", Layout(tp=4, pp=2), 261.2),
    _lanes("DeepSeek-V3, 72 lanes decode", 72, "decode", "output tok/s a node", 22300),
    _lanes("DeepSeek-V3, 72 lanes, half hidden", 72, "decode", "output tok/s a node", 22300, overlap=0.5),
    _lanes("DeepSeek-V3, 256 lanes decode", 256, "decode", "output tok/s a node", None),
    _lanes("DeepSeek-V3, 32 lanes prefill", 32, "prefill", "input tok/s a node", 52300),
    _lanes("DeepSeek-V3, 32 lanes, half hidden", 32, "prefill", "input tok/s a node", 52300, overlap=0.5),
]


def simulate(deployment: Deployment, folder: Path) -> tuple[float, Outcome]:
    """The figure that the deployment is asked for, and all others."""
    path = folder / deployment.shape
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(SHAPES[deployment.shape]))
    accelerator = read_accelerator(HERE / "accelerators" / f"{deployment.accelerator}.json")
    if deployment.overlap is not None:
        accelerator = msgspec.structs.replace(accelerator, overlap=deployment.overlap)
    shape, layout = model_shape(load_model_config(str(path)), deployment.weights), deployment.layout
    check_layout(layout, shape)
    limits = Limits(
        cache_tokens=cache_tokens(layout, shape, accelerator),
        max_rows=deployment.max_rows,
        max_tokens=deployment.max_tokens,
        stages=layout.pp,
    )
    costs = RooflineCosts(shape, layout, accelerator)
    outcome = Simulation(costs=costs, limits=limits, traffic=deployment.traffic, num_lanes=layout.dp).run()
    nodes = layout.num_devices / accelerator.devices_per_node
    return {
        "ms between tokens": 1e3 * percentiles(outcome.between).get("p50", 0.0),
        "ms of a decoding step": 1e3 * min(outcome.between, default=0.0),
        "output tok/s": outcome.output_tokens / outcome.seconds,
        "input tok/s": outcome.input_tokens / outcome.seconds,
        "output tok/s a node": outcome.output_tokens / outcome.seconds / nodes,
        "input tok/s a node": outcome.input_tokens / outcome.seconds / nodes,
    }[deployment.figure], outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    print(f"{'deployment':48} {'figure':22} {'simulated':>10} {'known':>10} {'over it':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for deployment in DEPLOYMENTS:
            value, outcome = simulate(deployment, Path(folder))
            known = deployment.known
            ratio = None if known is None else value / known
            print(
                f"{deployment.name:48} {deployment.figure:22} {value:>10,.4g} "
                f"{'' if known is None else f'{known:,.4g}':>10} {'' if ratio is None else f'{ratio:.2f}':>8}"
            )
            rows.append(
                {
                    "deployment": deployment.name,
                    "figure": deployment.figure,
                    "simulated": value,
                    "known": known,
                    "source": deployment.source,
                    "steps": outcome.num_steps,
                    "parts_s": outcome.parts,
                }
            )
    if arguments.output:
        command = "python benchmarks/simulation/field.py"
        write(arguments.output, {"benchmark": "simulation", "command": command, "deployments": rows})


if __name__ == "__main__":
    main()
