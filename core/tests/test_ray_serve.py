"""The Ray Serve application: what it refuses, when it scales, and that no request is lost while it does."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from types import SimpleNamespace

import httpx
import pytest

from anychip.errors import ConfigError, DeviceUnavailable, EngineDead

ray = pytest.importorskip("ray", reason="Ray is not installed (anychip[ray])")
serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed (anychip[ray])")

from anychip.entrypoints.http.server import CLOSING_S  # noqa: E402
from anychip.ray_serve import AppConfig, QueueAndCache, Replica, Replicas, build  # noqa: E402

PORT = 18_231
BODY = {"prompt": [5] * 20, "max_tokens": 40, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"engine": {"model": "quickstart"}}, "give the engine a device by name"),
        ({"engine": {"device": "cpu", "tensor_paralel_size": 2}}, "tensor_paralel_size"),
        ({"engine": {"device": "cpu"}, "replica": {}}, "expected engine, server, replicas, actor_options"),
        ({"engine": {"device": "cpu"}, "replicas": {"min": 3, "max": 2}}, "min 3 and max 2"),
        ({"engine": {"device": "cpu"}, "replicas": {"kv_usage": 2.0}}, "kv_usage 2.0"),
        ({"engine": {"device": "cpu", "nodes": ["a"], "cluster_key": "k"}}, "executor ray"),
    ],
)
def test_configurations_that_cannot_be_are_refused(config, cause):
    with pytest.raises(ConfigError, match=cause):
        build(config)


def test_a_device_that_no_plugin_brings_is_refused():
    with pytest.raises(DeviceUnavailable, match="device 'strange' is unknown"):
        build({"engine": {"device": "strange"}})


@pytest.mark.parametrize(
    ("engine", "given", "options"),
    [
        ({"device": "cpu", "tensor_parallel_size": 2}, {}, {"num_cpus": 2}),
        ({"device": "cuda", "tensor_parallel_size": 4}, {"num_cpus": 8}, {"num_gpus": 4, "num_cpus": 8}),
        ({"device": "tpu"}, {}, {"resources": {"TPU": 1}}),
        ({"device": "cuda", "executor": "ray", "tensor_parallel_size": 4}, {}, {"num_cpus": 0}),
    ],
)
def test_a_replica_reserves_its_devices_and_has_the_time_of_its_drain(engine, given, options):
    app = build({"engine": engine, "actor_options": given, "server": {"drain_s": 50.0}})
    deployment = app._bound_deployment
    assert {name: value for name, value in deployment.ray_actor_options.items() if name in options} == options
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 50.0 + CLOSING_S


def wanted(waiting: list[float], kv_usage: list[float], now: int = 1) -> int:
    def by_replica(values: list[float]) -> dict[str, float]:
        return {f"r{index}": value for index, value in enumerate(values)}

    reported = {"waiting": by_replica(waiting), "kv_usage": by_replica(kv_usage)}
    context = SimpleNamespace(aggregated_metrics=reported, target_num_replicas=now)
    return QueueAndCache(8.0, 0.8)(context)[0]


def test_as_many_replicas_as_keep_each_below_both_limits():
    assert wanted([0.0], [0.0]) == 1
    assert wanted([8.0], [0.8]) == 1
    assert wanted([17.0], [0.1]) == 3
    assert wanted([0.0, 0.0], [0.7, 0.6], now=2) == 2
    assert wanted([0.0, 0.0], [0.2, 0.3], now=2) == 1


def test_without_figures_as_many_replicas_as_run_go_on():
    assert wanted([], [], now=3) == 3


def test_a_replica_is_healthy_while_its_engine_gives_signs_of_life_or_may_be_replaced():
    config = AppConfig(replicas=Replicas(restart_s=100.0))
    for silent_s in (0.0, 99.0):
        asyncio.run(Replica.check_health(SimpleNamespace(_config=config, _llm=SimpleNamespace(silent_s=silent_s))))
    with pytest.raises(EngineDead, match="no sign of life for 101 s, 100 may pass"):
        asyncio.run(Replica.check_health(SimpleNamespace(_config=config, _llm=SimpleNamespace(silent_s=101.0))))


def test_a_replica_whose_engine_is_gone_reports_nothing_of_what_it_held():
    stats = SimpleNamespace(waiting=7, kv_blocks_used=30, kv_blocks=40)
    alive = SimpleNamespace(dead=None, metrics=SimpleNamespace(last=stats))
    dead = SimpleNamespace(dead=EngineDead("gone"), metrics=alive.metrics)
    told = [asyncio.run(Replica.record_autoscaling_stats(SimpleNamespace(_llm=llm))) for llm in (alive, dead)]
    assert told == [{"waiting": 7, "kv_usage": 0.75}, {"waiting": 0.0, "kv_usage": 0.0}]


@pytest.mark.full
def test_a_replica_may_have_its_workers_placed_by_ray():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, address="local")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        engine = {"device": "cpu", "executor": "ray", "tensor_parallel_size": 2, "kv_cache_bytes": 16 << 20}
        before = ray.available_resources()["CPU"]
        serve.run(build({"engine": engine}), name="chat")
        assert ray.available_resources()["CPU"] == before - 2
        answer = httpx.post(f"http://127.0.0.1:{PORT}/v1/completions", json=BODY, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == BODY["max_tokens"]
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.full
def test_no_request_is_lost_while_replicas_come_and_go(monkeypatch):
    for who in ("REPLICA", "HANDLE"):
        monkeypatch.setenv(f"RAY_SERVE_{who}_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, address="local")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        engine = {"device": "cpu", "max_num_seqs": 2, "kv_cache_bytes": 16 << 20}
        replicas = {"max": 2, "waiting_requests": 4.0, "upscale_s": 1.0, "downscale_s": 5.0}
        serve.run(build({"engine": engine, "replicas": replicas}), name="chat")
        seen, ends = asyncio.run(load_up_and_down())
        assert [*seen] == [1, 2, 1], seen
        assert set(ends) == {200}, ends
    finally:
        serve.shutdown()
        ray.shutdown()


async def load_up_and_down() -> tuple[list[int], Counter]:
    """Numbers of running replicas in the order in which they came, and how requests ended."""
    ends: Counter = Counter()
    seen: list[int] = []
    deadline = time.monotonic() + 240
    busy = asyncio.Event()
    busy.set()

    async def client(http: httpx.AsyncClient, *, heavy: bool) -> None:
        while seen != [1, 2, 1] and time.monotonic() < deadline:
            if heavy and not busy.is_set():
                return
            ends[await status_of(http)] += 1
            if not heavy:
                await asyncio.sleep(0.5)

    async def watch() -> None:
        while seen != [1, 2, 1] and time.monotonic() < deadline:
            status = await asyncio.to_thread(serve.status)
            running = status.applications["chat"].deployments["anychip"].replica_states.get("RUNNING", 0)
            if not seen or seen[-1] != running:
                seen.append(running)
            if seen[-1] == 2:
                busy.clear()
            await asyncio.sleep(0.2)

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=120) as http:
        await asyncio.gather(watch(), client(http, heavy=False), *(client(http, heavy=True) for _ in range(24)))
    return seen, ends


async def status_of(http: httpx.AsyncClient) -> int | str:
    try:
        return (await http.post("/v1/completions", json=BODY)).status_code
    except httpx.TransportError as error:
        return type(error).__name__
