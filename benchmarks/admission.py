"""How long the scheduler takes to let requests in: a burst with one prefix, a prompt of 100,000 tokens cold and cached,
and a head of the queue that the pool has no blocks for. No device takes part.

    python benchmarks/admission.py [--output benchmarks/results/admission.json]
"""

from __future__ import annotations

import argparse
import random
import time
from array import array
from pathlib import Path

from anychip.bench.report import write
from anychip.kv_cache.hashing import HASH_BYTES, prompt_hashes
from anychip.kv_cache.manager import KVCacheManager
from anychip.prefix import PLAIN_ROOT
from anychip.request import Request
from anychip.sampling_params import SamplingParams
from anychip.scheduler.policy import SchedulingPolicy
from anychip.scheduler.scheduler import Scheduler
from anychip.step_messages import StepResult
from anychip.types import RequestId
from anychip.worker_report import DeviceRules, KVCacheConfig, KVGroup

BLOCK_SIZE = 16
RNG = random.Random(0)


def scheduler(num_blocks: int, max_num_seqs: int) -> Scheduler:
    return Scheduler(
        kv=KVCacheManager(KVCacheConfig(num_blocks, (KVGroup(BLOCK_SIZE),)), prefix_caching=True),
        policy=SchedulingPolicy(),
        rules=DeviceRules(),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=8192,
    )


def request(arrival: int, ids: list[int], max_output: int) -> Request:
    """With the hashes that the API process would have made."""
    prompt = array("i", ids).tobytes()
    hashes = prompt_hashes(prompt, BLOCK_SIZE, PLAIN_ROOT)
    return Request(
        request_id=RequestId(str(arrival)),
        index=0,
        prompt=prompt,
        sampling=SamplingParams(max_tokens=max_output),
        max_output=max_output,
        stop_ids=frozenset(),
        seed=0,
        arrival=arrival,
        block_hashes=[hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)],
    )


def tokens(count: int) -> list[int]:
    return [RNG.randrange(3, 32000) for _ in range(count)]


def steps(one: Scheduler, count: int) -> list[float]:
    """Milliseconds of each schedule()."""
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        step = one.schedule()
        taken.append((time.perf_counter() - began) * 1e3)
        if step is not None:
            ids = array("i", [7] * len(step.sampling)).tobytes()
            one.update(step, StepResult(step.decision.step_id, ids, {}))
    return taken


def measure() -> dict[str, float]:
    burst, prefix = scheduler(20000, 8), tokens(4000)
    for number in range(2000):
        burst.add(request(number, prefix + [number] * 17, 4))
    found = {"burst_of_2000_worst_ms": max(steps(burst, 40))}
    one, long = scheduler(9000, 64), tokens(100_000)
    one.add(request(0, long, 1))
    found["cold_100k_worst_ms"] = max(steps(one, 14))
    one.add(request(1, long, 1))
    found["cached_100k_ms"] = max(steps(one, 1))
    for number in range(2, 10):
        one.add(request(number, tokens(5000), 500))
    steps(one, 20)
    one.add(request(10, long[:90_000] + tokens(60_000), 5))
    blocked = steps(one, 41)
    found["blocked_head_first_ms"], found["blocked_head_then_median_ms"] = blocked[0], sorted(blocked[1:])[20]
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = [measure() for _ in range(3)]
    medians = {name: sorted(run[name] for run in found)[1] for name in found[0]}
    for name, value in medians.items():
        print(f"{name:>28} {value:>9.3f}")
    if arguments.output:
        write(arguments.output, {"benchmark": "admission", "command": "python benchmarks/admission.py", **medians})


if __name__ == "__main__":
    main()
