"""What a step costs beside the device: schedule, delta encoding, the workers' apply, and the update with results.

The executor is a fake that answers at once; every request decodes. The median step time is fitted as fixed + slope x
running requests: for a model of one KV group (full attention), for one of two (full attention and a sliding window),
for one group where every row has four drafted tokens, all of which are drawn, and for one group whose requests lie in
four data-parallel lanes. What the workers of the lanes would apply side by side is added up.

    python benchmarks/engine_overhead.py [--output benchmarks/results/engine_overhead.json]

`--processor-time` leaves out the time in which others had the core, where the machine is shared.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from anychip.bench.report import write
from anychip.drafts import Draft, Drafter
from anychip.kv_cache.manager import KVCacheManager
from anychip.plugin_api import ShapePolicy, StepLimits
from anychip.request import Request
from anychip.sampling_params import SamplingParams
from anychip.scheduler.lanes import LaneScheduler, LaneStep
from anychip.scheduler.policy import SchedulingPolicy
from anychip.scheduler.scheduler import Scheduler
from anychip.speculation.proposer import Proposer
from anychip.speculation.speculator import Speculator
from anychip.step_messages import AnyDecision, AnyResult, LaneDecisions, LaneResults, StepDecision, StepResult
from anychip.types import RequestId
from anychip.worker.input_batch import InputBatch
from anychip.worker_report import DeviceRules, KVCacheConfig, KVGroup

BLOCK_SIZE = 16
PROMPT = 64
STEPS = 400
MAX_OUTPUT = STEPS + 32
MAX_LEN = PROMPT + MAX_OUTPUT + 32
FULL, WINDOW = KVGroup(BLOCK_SIZE), KVGroup(BLOCK_SIZE, window=128)
COUNTS = (16, 64, 128, 256, 512, 768, 1024)
DRAFTS = 4
TARGET_SLOPE_US, TARGET_DRAFTS_SLOPE_US, TARGET_LANES_SLOPE_US, TARGET_FIXED_US = 2.5, 5.0, 3.0, 100.0
TOKEN = 7
"""What the fake device draws, always."""


class Layout(NamedTuple):
    """`target` is the slope that is aimed at, `drafts` are tokens a row."""

    groups: tuple[KVGroup, ...]
    target: float
    drafts: int = 0
    lanes: int = 1


LAYOUTS = {
    "full attention": Layout((FULL,), TARGET_SLOPE_US),
    "full attention and a window": Layout((FULL, WINDOW), TARGET_SLOPE_US),
    "full attention, drafts of 4": Layout((FULL,), TARGET_DRAFTS_SLOPE_US, drafts=DRAFTS),
    "full attention, 4 lanes": Layout((FULL,), TARGET_LANES_SLOPE_US, lanes=4),
}


class Sure(Drafter):
    """Knows what the fake device draws, at no cost: the engine's is measured."""

    _known = Draft([TOKEN] * DRAFTS, evidence=1)

    def extend(self, token_ids: Sequence[int]) -> None:
        pass

    def catch_up(self, most: int) -> int:
        return most

    def draft(self, most: int) -> Draft:
        return self._known


class AlwaysSure(Proposer):
    def begin(self, owner: str) -> Drafter:
        return Sure()

    def end(self, drafter: Drafter) -> None:
        pass


class FakeWorker:
    """Applies deltas as a worker does, and answers every sample with a token."""

    def __init__(self, num_seqs: int, max_len: int, num_groups: int) -> None:
        pages = -(-max_len // BLOCK_SIZE)
        limits = StepLimits(
            max_num_tokens=num_seqs * PROMPT,
            max_num_reqs=num_seqs,
            max_model_len=max_len,
            max_slots=num_seqs,
            max_drafts=DRAFTS,
            max_pages=(pages,) * num_groups,
        )
        self.batch = InputBatch(
            limits=limits,
            block_sizes=(BLOCK_SIZE,) * num_groups,
            slot_dtype="int64",
            dummy_padding=False,
            vocab_size=32000,
            policy=ShapePolicy(),
            ring=None,  # type: ignore[arg-type]  # no inputs are built here
        )
        self._decoder = msgspec.msgpack.Decoder(StepDecision)

    def step(self, encoded: bytes) -> StepResult:
        rows = self.batch.apply(self._decoder.decode(encoded))
        ids = np.full(len(rows.sample_rows), TOKEN, dtype=np.int32).tobytes()
        gained = np.bincount(rows.sample_rows)[rows.sampling].astype(np.int32).tobytes() if len(rows.drafts) else b""
        return StepResult(rows.step_id, ids, {}, num_gained=gained)


class FakeLanes:
    """The workers of all lanes, or of the only one."""

    def __init__(self, num_seqs: int, layout: Layout) -> None:
        each = num_seqs // layout.lanes
        self._workers = [FakeWorker(each, MAX_LEN, len(layout.groups)) for _ in range(layout.lanes)]
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, decision: AnyDecision) -> list[bytes]:
        parts = decision.lanes if isinstance(decision, LaneDecisions) else [decision]
        return [self._encoder.encode(part) for part in parts]

    def step(self, step_id: int, encoded: Sequence[bytes]) -> AnyResult:
        results = [worker.step(each) for worker, each in zip(self._workers, encoded, strict=True)]
        return results[0] if len(results) == 1 else LaneResults(step_id, list(results))


def make_scheduler(num_seqs: int, layout: Layout) -> Scheduler | LaneScheduler:
    """With `num_seqs` requests that wait. Lanes share the slots and the blocks that one would have."""
    each, drafts = num_seqs // layout.lanes, layout.drafts
    blocks = 1 + len(layout.groups) * each * -(-MAX_LEN // BLOCK_SIZE)
    lanes = [
        Scheduler(
            kv=KVCacheManager(KVCacheConfig(blocks, layout.groups), prefix_caching=True),
            policy=SchedulingPolicy(),
            rules=DeviceRules(),
            max_num_seqs=each,
            max_num_batched_tokens=each * PROMPT,
            speculator=Speculator(AlwaysSure(), max_drafts=drafts, vocab_size=32000, costs=None) if drafts else None,
        )
        for _ in range(layout.lanes)
    ]
    scheduler = lanes[0] if len(lanes) == 1 else LaneScheduler(lanes, meeting=True)
    rng = np.random.default_rng(0)
    sampling = SamplingParams(max_tokens=MAX_OUTPUT)
    for index in range(num_seqs):
        scheduler.add(
            Request(
                request_id=RequestId(str(index)),
                index=0,
                prompt=rng.integers(0, 32000, PROMPT + index % BLOCK_SIZE, dtype=np.int32).tobytes(),
                sampling=sampling,
                max_output=MAX_OUTPUT,
                stop_ids=frozenset({2}),
                seed=index,
                arrival=index,
            )
        )
    return scheduler


def measure(num_seqs: int, layout: Layout, *, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Median microseconds of one step with `num_seqs` decoding requests, by part."""
    scheduler, workers = make_scheduler(num_seqs, layout), FakeLanes(num_seqs, layout)
    parts: dict[str, list[float]] = {"schedule": [], "encode": [], "apply": [], "update": [], "total": []}
    gc.collect()
    gc.freeze()
    for number in range(STEPS // (1 + layout.drafts)):
        t0 = clock()
        step = scheduler.schedule()
        assert step is not None
        t1 = clock()
        encoded = workers.encode(step.decision)
        t2 = clock()
        result = workers.step(step.decision.step_id, encoded)
        t3 = clock()
        scheduler.update(step, result)  # type: ignore[arg-type]  # each takes its own steps
        t4 = clock()
        own = step.lanes if isinstance(step, LaneStep) else [step]
        if number >= 20 and sum(len(each.sampling) for each in own if each is not None) == num_seqs:
            for name, seconds in zip(parts, (t1 - t0, t2 - t1, t3 - t2, t4 - t3, t4 - t0), strict=True):
                parts[name].append(seconds * 1e6)
    gc.unfreeze()
    return {name: statistics.median(values) for name, values in parts.items()}


Medians = dict[int, dict[str, float]]
"""Microseconds by number of requests and by part."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--layout", action="append", choices=list(LAYOUTS), help="of several, take turns; default: all")
    arguments = parser.parse_args()
    clock = time.thread_time if arguments.processor_time else time.perf_counter
    runs: dict[str, list[Medians]] = {name: [] for name in arguments.layout or LAYOUTS}
    for _ in range(arguments.repeats):
        for name, found in runs.items():
            found.append({count: measure(count, LAYOUTS[name], clock=clock) for count in COUNTS})
    layouts = {name: show(name, found) for name, found in runs.items()}
    if arguments.output:
        write(
            arguments.output,
            {
                "benchmark": "engine_overhead",
                "command": shlex.join(["python", "benchmarks/engine_overhead.py", *sys.argv[1:]]),
                "layouts": layouts,
            },
        )


def show(name: str, runs: Sequence[Medians]) -> dict[str, object]:
    """Slope, fixed part and medians of one layout, printed and returned."""
    medians = {
        count: {part: statistics.median(run[count][part] for run in runs) for part in runs[0][count]}
        for count in COUNTS
    }
    slope, fixed = np.polyfit(COUNTS, [medians[count]["total"] for count in COUNTS], 1)
    print(f"\n{name}\n{'requests':>9} {'schedule':>9} {'encode':>9} {'apply':>9} {'update':>9} {'total us':>9}")
    for count, row in medians.items():
        print(f"{count:>9} " + " ".join(f"{row[part]:>9.1f}" for part in row))
    print(
        f"slope {slope:.2f} us per request (goal {LAYOUTS[name].target}), fixed {fixed:.1f} us (goal {TARGET_FIXED_US})"
    )
    return {
        "slope_us_per_request": round(float(slope), 3),
        "fixed_us_per_step": round(float(fixed), 1),
        "median_us": {str(count): {k: round(v, 1) for k, v in row.items()} for count, row in medians.items()},
    }


if __name__ == "__main__":
    main()
