"""Writes the figures of benchmarks/results/cpu into docs/performance/cpu.md, between its markers, with a plot for each
workload.

python benchmarks/cpu/report.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/cpu"
PAGE = ROOT / "docs/performance/cpu.md"
TITLES = {
    "a": "One stream, ms a token (lower is better)",
    "b": "16 ragged requests, output tokens a second",
    "c": "16 requests that share 512 tokens, seconds (lower is better)",
    "d": "A prompt of 2,048, tokens a second",
}


def main() -> None:
    comparisons = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("M*.json"))}
    page = PAGE.read_text()
    page = filled(page, "comparison", comparison_table(comparisons))
    page = filled(page, "ready", ready_table(comparisons))
    page = filled(page, "starts", starts_table())
    page = filled(page, "states", states_table())
    page = filled(page, "state kernels", state_kernel_table())
    kernels = RESULTS / "kernels.json"
    if kernels.exists():
        page = filled(page, "kernels", kernel_table(json.loads(kernels.read_text())))
    PAGE.write_text(page)
    for workload, title in TITLES.items():
        plot(comparisons, workload, title)


def filled(page: str, name: str, text: str) -> str:
    begin, end = f"<!-- {name}: written by benchmarks/cpu/report.py -->", f"<!-- {name} ends -->"
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{text}\n{end}", page, flags=re.S)


def states_table() -> str:
    """Workloads e and f, of models with latents and states."""
    lines = [
        "| workload | model | engine | output tok/s: median (least to most) | anychip over it |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("states-M*.json")):
        for row in json.loads(path.read_text())["summary"]:
            ratio = "" if row["engine"] == "anychip" else f"{row['anychip_over_it']:.2f}"
            spread = f"{row['median']:.1f} ({row['least']:.1f} to {row['most']:.1f})"
            model = path.stem.removeprefix("states-")
            lines.append(f"| {row['workload']} | {model} | {row['engine']} | {spread} | {ratio} |")
    return "\n".join(lines)


def state_kernel_table() -> str:
    report = json.loads((RESULTS / "states-kernels.json").read_text())
    lines = [
        f"Variant {report['isa']}, {report['threads']} thread; seconds of {report['seconds_of']}.",
        "",
        "| kernel | shape | microseconds | the reference's | times faster | GB/s | of the bandwidth |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["kernels"]:
        before, after = 1e6 * row["reference_seconds"], 1e6 * row["seconds"]
        rate = f"{row['gb_s']:.1f} | {row['of_bandwidth']:.0%}" if row["gb_s"] >= 0.5 else " | "
        shape = f"{row['kernel']} | {row['shape']}"
        lines.append(f"| {shape} | {after:.0f} | {before:.0f} | {row['speedup']:.1f} | {rate} |")
    return "\n".join(lines)


def comparison_table(comparisons: dict[str, Any]) -> str:
    lines = [
        "| workload | model | engine | median (least to most) | anychip over it | GB/s around it |",
        "|---|---|---|---|---|---|",
    ]
    for workload in TITLES:
        for model, report in comparisons.items():
            for row in report["summary"]:
                if row["workload"] == workload:
                    ratio = "" if row["engine"] == "anychip" else f"{row['anychip_over_it']:.2f}"
                    spread = f"{row['median']:.1f} ({row['least']:.1f} to {row['most']:.1f}) {row['unit']}"
                    name = f"{row['engine']}"
                    lines.append(
                        f"| {workload} | {model} | {name} | {spread} | {ratio} | {row['bandwidth_gb_s']:.0f} |"
                    )
    return "\n".join(lines)


def ready_table(comparisons: dict[str, Any]) -> str:
    lines = [
        "| model | engine | ready after, s | resident then, GiB | resident at the end, GiB |",
        "|---|---|---|---|---|",
    ]
    for model, report in comparisons.items():
        for engine, ready in report["ready"].items():
            if not ready:
                continue
            last = max(row["resident"] for row in report["rounds"] if row["engine"] == engine)
            lines.append(
                f"| {model} | {engine} | {ready['seconds']:.1f} "
                f"| {ready['resident'] / 2**30:.2f} | {last / 2**30:.2f} |"
            )
    return "\n".join(lines)


def starts_table() -> str:
    """Of `anychip bench startup --output startup-MODEL-plain.json`, and -kept.json with packed weights."""
    lines = [
        "| model | weights | ready after, s: median, most | engine's resident memory, MiB |",
        "|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("startup-*.json")):
        _, model, how = path.stem.split("-")
        report = json.loads(path.read_text())
        seconds = report["seconds"]
        lines.append(
            f"| {model} | {'kept' if how == 'kept' else 'from the checkpoint'} "
            f"| {seconds['p50']:.1f}, {seconds['max']:.1f} | {report['engine_mib']['p50']:.0f} |"
        )
    return "\n".join(lines)


def kernel_table(report: dict[str, Any]) -> str:
    lines = [
        f"Variant {report['isa']}; torch's own bfloat16 product reached {report['torch_gflop_s']:.0f} GFLOP/s here.",
        "",
        "| kernel | shape | GB/s | of the bandwidth | GFLOP/s | of torch's product |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["kernels"]:
        lines.append(
            f"| {row['kernel']} | {row['shape']} | {row['gb_s']:.1f} | {row['of_bandwidth']:.0%} "
            f"| {row['gflop_s']:.0f} | {row['of_torch']:.0%} |"
        )
    return "\n".join(lines)


def plot(comparisons: dict[str, Any], workload: str, title: str) -> None:
    models = [m for m, report in comparisons.items() if any(r["workload"] == workload for r in report["rounds"])]
    engines = list(
        dict.fromkeys(r["engine"] for m in models for r in comparisons[m]["rounds"] if r["workload"] == workload)
    )
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(engines))
    for place, engine in enumerate(engines):
        for index, model in enumerate(models):
            values = [
                r["value"] for r in comparisons[model]["rounds"] if r["workload"] == workload and r["engine"] == engine
            ]
            if values:
                middle = sorted(values)[len(values) // 2]
                spread = [[middle - min(values)], [max(values) - middle]]
                axes.bar(
                    index + (place - (len(engines) - 1) / 2) * width, middle, width, yerr=spread, capsize=3,
                    color=f"C{place}", label=engine if index == 0 else None,
                )  # fmt: skip
    axes.set_xticks(range(len(models)), models)
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(PAGE.parent / f"cpu-{workload}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
