"""The vendor's ProcessGroupHCCL over the simulator, on 2 and 4 processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("anychip_npu_simulator.runtime", reason="needs torch_npu: make ascend-test", exc_type=ImportError)


def run(size: int, folder: Path, what: str = "all") -> list[dict[str, object]]:
    environment = {**os.environ, "NPU_SIMULATOR_DEVICES": str(size), "OMP_NUM_THREADS": "1"}
    program = str(Path(__file__).with_name("hccl_rank.py"))
    ranks = [
        subprocess.Popen(
            [sys.executable, program, str(rank), str(size), str(folder / "store"), what],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    said = [rank.communicate(timeout=240) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(error[-1500:] for _, error in said)
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.parametrize("size", [2, 4])
def test_collectives(size, tmp_path):
    ranks = run(size, tmp_path)
    for rank, said in enumerate(ranks):
        total = [sum(100 * r + i for r in range(size)) for i in range(5)]
        assert said["all_reduce"][0] == total and said["all_reduce"][2] == total
        assert all(abs(got - wanted) <= wanted / 64 for got, wanted in zip(said["all_reduce"][1], total, strict=True))
        assert said["all_gather"] == [[100 * r + i for i in range(3)] for r in range(size)]
        assert said["reduce_scatter"] == [sum(100 * r + i + 1000 * rank for r in range(size)) for i in range(2)]
        assert said["all_to_all"] == [[100 * r + 2 * rank, 100 * r + 2 * rank + 1] for r in range(size)]
        expected = []
        for r in range(size):
            begin = sum((r + j) % 3 for j in range(rank))
            expected += [[100 * r + 2 * (begin + i), 100 * r + 2 * (begin + i) + 1] for i in range((r + rank) % 3)]
        assert said["all_to_all_v"] == expected
        assert said["broadcast"] == [100, 101]
        assert said["send_and_receive"] == ([0, 1] if rank < 2 else [100 * rank, 100 * rank + 1])
        assert said["captured"] == [2 * sum(r + 1 for r in range(size)) + 1] * 2
        assert said["disagree"] is True
