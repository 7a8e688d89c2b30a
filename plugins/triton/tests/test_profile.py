"""torch's profiler on the host's clock: with operations of the CPU in place of a device's kernels."""

from __future__ import annotations

import time

import torch

from anychip_triton.profile import DEVICE_WORK, device_profile, device_spans

SLACK_NS = 20_000_000
"""Of two clocks that are read one after the other."""


def test_spans_lie_where_the_host_saw_them():
    x = torch.randn(400, 400)
    with device_profile([torch.profiler.ProfilerActivity.CPU], work=["cpu_op"]) as profile:
        time.sleep(0.1)
        began = time.perf_counter_ns()
        x @ x
        ended = time.perf_counter_ns()
        time.sleep(0.1)
        torch.neg(x)
    (product,) = [span for span in profile.spans if span.name == "aten::mm"]
    assert began - SLACK_NS < product.start_ns < product.end_ns < ended + SLACK_NS
    (negation,) = [span for span in profile.spans if span.name == "aten::neg"]
    assert negation.start_ns - product.end_ns > 60_000_000


def test_of_a_devices_trace_kernels_and_copies_are_taken():
    """As the profiler writes them on a device: user annotations and driver calls are not its work."""
    events = [
        {"ph": "X", "cat": "gpu_user_annotation", "name": "anychip clock", "ts": 1001.0, "dur": 1.0},
        {"ph": "X", "cat": "user_annotation", "name": "anychip clock", "ts": 1000.0, "dur": 1.0},
        {"ph": "X", "cat": "kernel", "name": "paged_attention", "ts": 1010.5, "dur": 4.25, "args": {"stream": 7}},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 1002.0, "dur": 2.0, "args": {"stream": 13}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1001.0, "dur": 3.0},
        {"ph": "i", "name": "Iteration Start", "ts": 1000.0},
    ]
    spans = device_spans(events, DEVICE_WORK, 5_000_000)
    assert [(span.name, span.start_ns, span.end_ns, span.stream) for span in spans] == [
        ("paged_attention", 5_010_500, 5_014_750, 7),
        ("Memcpy HtoD", 5_002_000, 5_004_000, 13),
    ]
