"""What the host does for a step of LLM.generate, all of it: a device that needs no time serves the requests.

`N` prompts of 512 tokens write 129 tokens, and others 1; a step's time is the difference over 128, as
benchmarks/gpu/engine.py takes it, in time of the processor: everything runs on the caller's thread. What is left out
are torch's calls: a program in the step seam answers at once.

python benchmarks/host_path.py [--output benchmarks/results/host_path.json] [--profile N]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from anychip import LLM, SamplingParams
from anychip.bench.report import write
from anychip.plugin_api import (
    API_VERSION,
    Decision,
    DeviceInfo,
    HostOutputs,
    KVPlan,
    ModelSource,
    Platform,
    PlatformManifest,
    ProbeResult,
    ReadyOutputs,
    SamplingInputs,
    ShapePolicy,
    StepInputs,
    StepLimits,
    StepOutputs,
    StepProgram,
    hookimpl,
)
from anychip_triton.graph import DecodeShapes

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import workloads

COUNTS = (1, 8, 32, 128, 512)
PROMPT, STEPS = 512, workloads.STEP_TOKENS
TOKEN = 7
"""What the device draws, always."""
TARGET_SLOPE_US = 5.0


class Program(StepProgram):
    """Every step is over when it is launched."""

    def initial_state(self, num_blocks: int) -> None:
        return None

    def forward(self, state: None, inputs: StepInputs) -> tuple[None, None]:
        return None, None

    def sample(self, state: None, hidden: None, late: SamplingInputs) -> tuple[None, StepOutputs]:
        ids = np.full(late.num_samples, TOKEN, dtype=np.int32)
        return None, ReadyOutputs(HostOutputs(token_ids=ids))


class FreePlatform(Platform):
    def shape_policy(self, limits: StepLimits) -> ShapePolicy:
        return DecodeShapes(limits)

    def step_program(self, model: ModelSource, kv: KVPlan, limits: StepLimits) -> StepProgram:
        return Program()


def probe() -> ProbeResult:
    return ProbeResult(devices=(DeviceInfo(index=0, name="free", backing="simulated"),))


@hookimpl
def anychip_platforms() -> Sequence[PlatformManifest]:
    limits = Decision(fill={"max_num_seqs": max(COUNTS), "max_num_batched_tokens": 8192})
    return [
        PlatformManifest(
            name="free",
            package="free-device",
            api_version=API_VERSION,
            summary="needs no time",
            probe="host_path:probe",
            platform="host_path:FreePlatform",
            seam="step",
            negotiate=lambda config, found: limits,
            auto_select=False,
        )
    ]


def install(folder: Path) -> None:
    """This file becomes a package with a device."""
    info = folder / "free_device-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: free-device\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[anychip]\nfree = host_path\n")
    sys.path.append(str(folder))


class Callers:
    """Prompts that no cache has seen."""

    def __init__(self, llm: LLM, vocab_size: int) -> None:
        self._llm = llm
        self._rng = np.random.default_rng(0)
        self._vocab_size = vocab_size

    def seconds(self, count: int, max_tokens: int) -> float:
        """Of one call with `count` prompts."""
        prompts = self._rng.integers(3, self._vocab_size, (count, PROMPT)).tolist()
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        began = time.thread_time()
        outputs = self._llm.generate(prompts, sampling)
        took = time.thread_time() - began
        assert all(output.outputs[0].token_ids == [TOKEN] * max_tokens for output in outputs)
        return took

    def step_us(self, count: int) -> float:
        return 1e6 * (self.seconds(count, 1 + STEPS) - self.seconds(count, 1)) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", type=int, metavar="N", help="shows where the time of N requests goes instead")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder))
        checkpoint = workloads.write_checkpoint("tiny", Path(folder))
        vocab_size = workloads.SHAPES["tiny"]["vocab_size"]
        settings = {"load_format": "dummy", "skip_tokenizer": True, "max_model_len": 16384}
        with LLM(str(checkpoint), device="free", num_kv_blocks=40_000, **settings) as llm:
            callers = Callers(llm, vocab_size)
            callers.seconds(max(COUNTS), 1 + STEPS)  # first-use costs
            if arguments.profile:
                with cProfile.Profile(time.thread_time) as profile:
                    callers.seconds(arguments.profile, 1 + STEPS)
                pstats.Stats(profile).sort_stats("tottime").print_stats(40)
                return
            figures = {n: [callers.step_us(n) for _ in range(arguments.repeats)] for n in COUNTS}
    report(figures, arguments.output)


def report(figures: dict[int, list[float]], output: Path | None) -> None:
    """Prints the medians and their fit, and writes them."""
    medians = {count: statistics.median(values) for count, values in figures.items()}
    slope, fixed = np.polyfit(list(medians), list(medians.values()), 1)
    for count, us in medians.items():
        print(f"{count:>5} requests: {us:>8.0f} us a step (least {min(figures[count]):.0f})")
    print(f"slope {slope:.2f} us per request (goal {TARGET_SLOPE_US}), fixed {fixed:.0f} us")
    if output:
        write(
            output,
            {
                "benchmark": "host_path",
                "command": "python benchmarks/host_path.py",
                "slope_us_per_request": round(float(slope), 2),
                "fixed_us_per_step": round(float(fixed), 1),
                "median_us": {str(count): round(us, 1) for count, us in medians.items()},
                "least_us": {str(count): round(min(values), 1) for count, values in figures.items()},
            },
        )


if __name__ == "__main__":
    main()
