"""What penalties cost a step on the host: engine and worker, beside a step without them.

256 requests of 3,000-token prompts decode over a vocabulary of 152,064; messages cross as between processes, the worker
fills each step's inputs, and no device computes. Steps with and without penalties take turns.

    python benchmarks/penalties.py [--output benchmarks/results/penalties.json]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import deque
from pathlib import Path

import msgspec
import numpy as np
import torch

from anychip.bench.report import write
from anychip.engine.engine_core import EngineCore
from anychip.kv_cache.manager import KVCacheManager
from anychip.messages import AddRequest
from anychip.plugin_api import ShapePolicy, StepLimits
from anychip.sampling_params import SamplingParams
from anychip.scheduler.policy import SchedulingPolicy
from anychip.scheduler.scheduler import Scheduler
from anychip.step_messages import LateInputs, StepDecision, StepResult
from anychip.worker.input_batch import InputBatch
from anychip.worker.staging import StagingRing
from anychip.worker_report import DeviceRules, KVCacheConfig, KVGroup, MemoryPlan, WorkerReady

ROWS, PROMPT, VOCABULARY, STEPS, BLOCK_SIZE = 256, 3000, 152_064, 100, 16
PENALTIES = {"repetition_penalty": 1.05, "presence_penalty": 0.5, "frequency_penalty": 0.25}
TARGET_MS, TARGET_KB = 0.3, 100.0


class NoDevice:
    """What a staging ring asks of a platform."""

    def event(self) -> NoDevice:
        return self

    def wait(self) -> None:
        return None

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)


class HostWorker:
    """executor.Executor whose worker prepares steps and draws at random; counts what would go to the device."""

    def __init__(self, kv: KVCacheConfig) -> None:
        self.ready = WorkerReady(kv, DeviceRules(), MemoryPlan(0, 0, 0, 0, kv.num_blocks, 0, 0.0), "host:0")
        length = PROMPT + STEPS + 64
        limits = StepLimits(
            max_num_tokens=ROWS * PROMPT, max_num_reqs=ROWS, max_model_len=length, max_slots=ROWS,
            max_pages=(-(-length // BLOCK_SIZE),),
        )  # fmt: skip
        self._batch = InputBatch(
            limits=limits, block_sizes=(BLOCK_SIZE,), slot_dtype="int64", dummy_padding=False, vocab_size=VOCABULARY,
            policy=ShapePolicy(), ring=StagingRing(NoDevice(), depth=6),  # type: ignore[arg-type]
        )  # fmt: skip
        self._encoder = msgspec.msgpack.Encoder()
        self._decisions, self._late = msgspec.msgpack.Decoder(StepDecision), msgspec.msgpack.Decoder(LateInputs)
        self._rng = np.random.default_rng(0)
        self._results: deque[StepResult] = deque()
        self.nbytes = 0  # to the device, by the last step

    def launch(self, decision: StepDecision) -> None:
        self._rows = self._batch.apply(self._decisions.decode(self._encoder.encode(decision)))
        self._inputs = self._batch.step_inputs(self._rows)
        self.nbytes = self._inputs.staged.nbytes

    def sample(self, late: LateInputs) -> None:
        given = self._late.decode(self._encoder.encode(late))
        inputs = self._batch.sampling_inputs(self._rows, self._inputs, given)
        if inputs.staged_at is None:
            self.nbytes += inputs.arena.nbytes
        ids = self._rng.integers(0, VOCABULARY, inputs.num_samples, dtype=np.int32)
        self._results.append(StepResult(self._rows.step_id, ids.tobytes(), {}))

    def collect(self) -> StepResult:
        return self._results.popleft()

    def check(self) -> None:
        return None

    def close(self, reason: str) -> None:
        return None


def decoding(penalties: dict[str, float]) -> EngineCore:
    """An engine whose every request has its prompt behind it."""
    groups = (KVGroup(BLOCK_SIZE),)
    blocks = 1 + ROWS * -(-(PROMPT + STEPS + 64) // BLOCK_SIZE)
    kv = KVCacheConfig(blocks, groups)
    scheduler = Scheduler(
        kv=KVCacheManager(kv, prefix_caching=False), policy=SchedulingPolicy(), rules=DeviceRules(), max_num_seqs=ROWS,
        max_num_batched_tokens=ROWS * PROMPT,
    )  # fmt: skip
    core = EngineCore(
        scheduler=scheduler, executor=HostWorker(kv), vocab_size=VOCABULARY, max_model_len=PROMPT + STEPS + 64,
        max_in_flight=2, max_waiting=ROWS, max_waiting_tokens=ROWS * PROMPT + 1, seed=0,
    )  # fmt: skip
    rng, sampling = np.random.default_rng(1), SamplingParams(max_tokens=STEPS + 32, **penalties)
    for index in range(ROWS):
        core.add(
            AddRequest(
                str(index), rng.integers(0, VOCABULARY, PROMPT, dtype=np.int32).tobytes(), sampling, STEPS + 32, (2,)
            )
        )
    while any(one.num_output == 0 for sequences in scheduler.requests.values() for one in sequences.values()):
        core.step()
    return core


def measure() -> dict[str, float]:
    """Median milliseconds of a step and bytes to the device, without and with penalties."""
    engines = {"plain": decoding({}), "penalties": decoding(PENALTIES)}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    gc.collect()
    gc.freeze()
    for _ in range(STEPS):
        for name, core in engines.items():
            begin = time.perf_counter()
            core.step()
            seconds[name].append(time.perf_counter() - begin)
    gc.unfreeze()
    found = {f"{name}_step_ms": 1e3 * statistics.median(values) for name, values in seconds.items()}
    found["penalties_ms"] = found["penalties_step_ms"] - found["plain_step_ms"]
    for name, core in engines.items():
        found[f"{name}_kb_to_device"] = core.executor.nbytes / 1e3  # type: ignore[attr-defined]
    found["penalties_kb_to_device"] -= found["plain_kb_to_device"]
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    runs = [measure() for _ in range(arguments.repeats)]
    medians = {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
    for name, value in medians.items():
        print(f"{name:>26} {value:>10.3f}")
    print(f"goals: {TARGET_MS} ms and {TARGET_KB} kB a step for penalties")
    if arguments.output:
        write(
            arguments.output,
            {
                "benchmark": "penalties",
                "command": "python benchmarks/penalties.py",
                "rows": ROWS,
                "prompt_tokens": PROMPT,
                "vocab_size": VOCABULARY,
                "median": medians,
                "runs": runs,
            },
        )


if __name__ == "__main__":
    main()
