"""Workers that Ray has placed: the same tokens, and what dies is replaced. One cluster, on this host, of two CPUs."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from served import Server, children

from anychip import LLM, SamplingParams
from anychip.errors import ConfigError, DeviceUnavailable

ray = pytest.importorskip("ray", reason="Ray is not installed (anychip[ray])")

PROMPT = [5 + (i * 37) % 500 for i in range(30)]
NUM_TOKENS = 12
SETTINGS = {"device": "cpu", "dtype": "float32", "kv_cache_bytes": 16 << 20}


@pytest.fixture(scope="module")
def cluster():
    """Its address, for servers."""
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, address="local")
    yield context.address_info["gcs_address"]
    ray.shutdown()


def generated(**settings) -> list[int]:
    with LLM(**SETTINGS, **settings) as llm:
        (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True))
        return list(output.outputs[0].token_ids)


def test_two_ranks_on_ray_give_the_tokens_of_one_process_and_leave_nothing_reserved(cluster):
    assert generated(executor="ray", tensor_parallel_size=2) == generated()
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 2


def test_more_ranks_than_ray_has_devices_are_refused_with_the_numbers(cluster):
    cause = "Ray has 2 of resource 'CPU', .* and 3 are needed; .*lower --tensor-parallel-size"
    with pytest.raises(DeviceUnavailable, match=cause):
        LLM(**SETTINGS, executor="ray", tensor_parallel_size=3)


def test_the_device_of_other_hosts_must_be_named():
    with pytest.raises(ConfigError, match="name one with --device"):
        LLM(**{**SETTINGS, "device": "auto"}, executor="ray")


@pytest.mark.full
@pytest.mark.parametrize("victim", ["worker", "agent"])
def test_requests_end_and_the_engine_is_replaced_when_a_process_is_killed(cluster, monkeypatch, victim):
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    options = ["--device", "cpu", "--executor", "ray", "--tensor-parallel-size", "2", "--kv-cache-bytes", "16M"]
    server = Server(*options)
    try:
        (worker, _) = sorted(workers())
        pid = worker if victim == "worker" else parent(worker)
        body = {"prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": True}
        text = ""
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            for chunk in response.iter_text():
                if not text:
                    os.kill(pid, signal.SIGKILL)
                text += chunk
        errors = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if '"error"' in line]
        assert errors, text[-300:]
        assert "worker" in errors[-1]["error"]["message"] or "agent" in errors[-1]["error"]["message"]
        server.wait_until_ready()
        assert server.metric("anychip_engine_restarts_total") == 1
        assert server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2}).status_code == 200
        assert worker not in workers() and len(workers()) == 2
    finally:
        assert server.stop() == 0
    deadline = time.monotonic() + 20
    while workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers() == []


def workers() -> list[int]:
    """Processes of workers that run below this Ray cluster's."""
    return [pid for pid in below(os.getpid()) if b"anychip.launch.worker_main" in command(pid)]


def below(pid: int) -> list[int]:
    try:
        found = children(pid)
    except (FileNotFoundError, ProcessLookupError):
        return []
    return found + [other for child in found for other in below(child)]


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid"))
