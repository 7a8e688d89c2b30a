"""Benchmarks run, say what they ran, and trace the stations; how fast anything is, no test asks."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anychip.bench import offline
from anychip.bench.gaps import gaps
from anychip.bench.online import Slo
from anychip.bench.report import percentiles
from anychip.bench.workload import Workload
from anychip.config import EngineConfig
from anychip.entrypoints.cli.main import main
from anychip.errors import ConfigError
from anychip.plugin_api import DeviceProfile, DeviceSpan
from anychip.worker.torch_program import TorchStepProgram
from anychip_cpu.platform import CpuPlatform

SMALL = ["--num-prompts", "3", "--input-len", "20", "--output-len", "5"]


def bench(kind: str, tmp_path: Path, *options: str) -> dict:
    output = tmp_path / "result.json"
    assert main(["bench", kind, "--device", "cpu", "--num-kv-blocks", "256", "--output", str(output), *options]) == 0
    return json.loads(output.read_text())


def test_the_same_seed_is_the_same_work():
    workload = Workload(num_prompts=5, input_len=40, output_len=10, spread=0.5, shared=8, seed=3)
    requests = workload.requests(500)
    assert requests == workload.requests(500)
    assert requests != Workload(num_prompts=5, input_len=40, output_len=10, spread=0.5, shared=8, seed=4).requests(500)
    assert len({tuple(prompt[:8]) for prompt, _ in requests}) == 1
    assert all(20 <= len(prompt) <= 60 and 5 <= sampling.max_tokens <= 15 for prompt, sampling in requests)
    assert all(3 <= token < 500 for prompt, _ in requests for token in prompt)


@pytest.mark.parametrize(("field", "value"), [("num_prompts", 0), ("spread", 1.0), ("shared", 41)])
def test_a_workload_that_cannot_be_is_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        Workload(**{"num_prompts": 1, "input_len": 40, "output_len": 1, field: value})


def test_percentiles_are_values_of_the_sample():
    assert percentiles([3.0, 1.0, 2.0]) == {"mean": 2.0, "p50": 2.0, "p90": 3.0, "p99": 3.0, "max": 3.0}
    assert percentiles([]) == {}


def test_throughput_counts_every_token_and_traces_every_station(tmp_path):
    result = bench("throughput", tmp_path, *SMALL, "--profile", str(tmp_path / "trace.json"))
    assert (result["prompt_tokens"], result["output_tokens"]) == (60, 15)
    assert result["workload"]["input_len"] == 20
    assert result["engine"]["num_kv_blocks"] == 256
    assert result["machine"]["packages"]["anychip"]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    stations = {span["name"].split(":")[0] for span in spans}
    assert stations >= {
        "2 input processor", "4 engine core", "5 scheduler", "6 executor", "7 model runner", "8 forward pass",
        "9 sampling", "10 scheduler", "11 output processor",
    }  # fmt: skip
    forwards = [span for span in spans if span["name"] == "8 forward pass"]
    launches = [span for span in spans if span["name"] == "6 executor: launch"]
    assert len(forwards) == len(launches) >= 5
    for inner, outer in zip(forwards, launches, strict=True):
        assert outer["ts"] <= inner["ts"]
        assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 0.01


def test_a_trace_shows_what_the_device_did_and_where_it_waited(tmp_path, monkeypatch):
    """With a platform that tells of one kernel for each step."""
    seen = []

    @contextmanager
    def profiler(platform):
        profile = DeviceProfile()
        yield profile
        profile.spans = seen

    real = TorchStepProgram.forward

    def forward(program, *arguments):
        start = time.perf_counter_ns()
        result = real(program, *arguments)
        seen.append(DeviceSpan("step", start, time.perf_counter_ns(), stream=7))
        return result

    monkeypatch.setattr(CpuPlatform, "profiler", profiler)
    monkeypatch.setattr(TorchStepProgram, "forward", forward)
    config = EngineConfig(model="quickstart", device="cpu", num_kv_blocks=64, max_model_len=128)
    workload = Workload(num_prompts=2, input_len=8, output_len=4)
    figures = offline.throughput(config, workload, lambda done: None, tmp_path / "trace.json")
    assert figures["device_spans"] >= 4 and 0 < figures["device_busy_share"] < 1
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X"]
    assert sum(span["tid"] == tracks["device stream 7"] for span in spans) == figures["device_spans"]
    idle = [span for span in spans if span["tid"] == tracks["device idle"]]
    assert idle and sum(span["dur"] > 100 for span in idle) == figures["device_gaps_over_100_us"]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=8))
def test_gaps_are_the_moments_without_any_span(spans):
    found = list(gaps(DeviceSpan("k", start, start + length) for start, length in spans))
    ends = [start + length for start, length in spans]
    busy = {moment for start, length in spans for moment in range(start, start + length)}
    whole = set(range(min((start for start, _ in spans), default=0), max(ends, default=0)))
    assert {moment for gap in found for moment in range(gap.start_ns, gap.end_ns)} == whole - busy
    assert all(gap.nanoseconds > 0 for gap in found)


def test_latency_has_a_moment_for_every_token_and_a_picture(tmp_path):
    result = bench("latency", tmp_path, *SMALL, "--plot", str(tmp_path / "plot.png"))
    assert len(result["samples"]["first_token_s"]) == 3
    assert len(result["samples"]["between_tokens_s"]) == 3 * 4
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_server_is_started_loaded_and_stopped(tmp_path):
    result = bench("serve", tmp_path, *SMALL, "--rate", "50", "--concurrency", "2")
    assert (result["requests"], result["failed"]) == (3, 0)
    assert len(result["samples"]["first_token_s"]) == 3


def test_startup_counts_its_starts(tmp_path):
    result = bench("startup", tmp_path, "--repeats", "1")
    assert len(result["runs"]) == 1
    assert result["runs"][0]["api_mib"] < result["runs"][0]["engine_mib"]


def test_a_plot_of_one_number_is_refused(capsys):
    assert main(["bench", "throughput", "--plot", "x.png"]) == 2
    assert "no distribution to plot" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_said(capsys):
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9", *SMALL]) == 2
    assert "127.0.0.1:9" in capsys.readouterr().err


def test_chat_like_lengths_spread_and_conversations_go_on():
    workload = Workload(num_prompts=300, input_len=60, output_len=30, mix="chat", seed=2)
    requests = workload.requests(5000)
    assert requests == workload.requests(5000)
    lengths = sorted(len(prompt) for prompt, _ in requests)
    assert lengths[0] < 20 and lengths[-1] > 300 and 60 < lengths[150] < 200
    prompts = {tuple(prompt) for prompt, _ in requests}
    going_on = sum(any(p[: len(other)] == other for other in prompts if len(other) < len(p)) for p in prompts)
    assert 60 < going_on < 180


def test_a_server_is_measured_at_several_rates_against_an_slo(tmp_path):
    plot = tmp_path / "rates.png"
    options = ["--rate", "50,100", "--slo", "ttft=30,tpot=10", "--mix", "chat", "--plot", str(plot)]
    found = bench("serve", tmp_path, *SMALL, *options)
    assert [run["rate"] for run in found["rates"]] == [50, 100]
    for run in found["rates"]:
        assert run["failed"] == 0 and run["good_share"] == 1
        assert run["goodput_requests_per_s"] == pytest.approx(run["requests_per_s"])
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("slo", ["ttft", "latency=3", "ttft=fast"])
def test_an_slo_that_is_none_is_refused(slo):
    with pytest.raises(ConfigError, match="is not like ttft=0.5,tpot=0.05"):
        Slo.parse(slo)
