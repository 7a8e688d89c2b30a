"""What operators see: metrics that add up, a dashboard whose every query resolves, traces, logs without prompts."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from served import CHAT, Server

from anychip import SamplingParams
from anychip.config import EngineConfig
from anychip.engine.input_processor import RequestOptions
from anychip.engine_stats import EngineStats
from anychip.errors import InvalidRequest
from anychip.launch.async_llm import AsyncLLM
from anychip.observability.metrics import Metrics
from anychip.observability.tracing import Tracer

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from grafana_dashboard import TARGET, dashboard


@pytest.fixture(scope="module")
def server():
    running = Server("--device", "cpu", "--kv-cache-bytes", "32M")
    for body in (CHAT, CHAT | {"stream": True, "n": 2}, CHAT | {"temperature": -1}):
        running.post("/v1/chat/completions", body)
    running.post("/v1/completions", {"prompt": [5] * 64, "max_tokens": 3})
    running.post("/v1/completions", {"prompt": [5] * 64, "max_tokens": 3})
    yield running
    assert running.stop() == 0


def scrape(server: Server) -> dict:
    return {
        sample.name + json.dumps(sorted(sample.labels.items())): sample
        for family in text_string_to_metric_families(server.client.get("/metrics").text)
        for sample in family.samples
    }


def test_metrics_add_up(server):
    total = {name: server.metric(f"anychip_{name}") for name in (
        "generation_tokens_total", "request_success_total", "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count", "request_queue_time_seconds_count", "e2e_request_latency_seconds_count",
        "request_prompt_tokens_sum", "prompt_tokens_total", "prefix_cache_hits_total", "prefix_cache_queries_total",
    )}  # fmt: skip
    assert total["generation_tokens_total"] == 8 + 16 + 3 + 3
    assert total["request_success_total"] == 1 + 2 + 1 + 1
    assert total["time_to_first_token_seconds_count"] == total["e2e_request_latency_seconds_count"] == 4
    assert total["request_queue_time_seconds_count"] == 4
    assert total["request_prompt_tokens_sum"] == total["prompt_tokens_total"]
    assert total["prefix_cache_hits_total"] >= 48 and total["prefix_cache_queries_total"] > 128
    assert server.metric("anychip_engine_up") == 1 and server.metric("anychip_kv_cache_blocks") == 511
    refused = [
        s for s in scrape(server).values() if s.name == "anychip_http_requests_total" and s.labels["status"] == "400"
    ]
    assert sum(sample.value for sample in refused) == 1


def test_every_query_of_the_dashboard_resolves_against_a_scrape(server):
    assert json.loads(TARGET.read_text()) == dashboard(), "python tools/grafana_dashboard.py"
    samples = scrape(server).values()
    # Counters with labels appear with their first event: what has not happened yet has a family, not a sample.
    families = {f.name for f in text_string_to_metric_families(server.client.get("/metrics").text)}
    asked = 0
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            for name, selector in re.findall(r"(anychip_\w+)(\{[^}]*\})?", target["expr"]):
                asked += 1
                labels = set(re.findall(r"(\w+)=", selector))
                by = set(re.findall(r"sum by \((\w+)\)", target["expr"])) - {"le"}
                found = [sample for sample in samples if sample.name == name]
                if not found:
                    assert name.removesuffix("_total") in families, f"{panel['title']}: no metric {name}"
                assert all(labels | by <= set(sample.labels) for sample in found), f"{panel['title']}: {name}"
    assert asked > 30


def test_log_lines_have_ids_and_no_prompts(monkeypatch):
    monkeypatch.setenv("ANYCHIP_LOG_FORMAT", "json")
    server = Server("--device", "cpu", "--kv-cache-bytes", "32M")
    try:
        secret = {"messages": [{"role": "user", "content": "the password is hunter2"}], "max_tokens": 2}
        answer = server.post("/v1/chat/completions", secret, headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        server.post("/v1/completions", {"prompt": "hunter2", "temperature": -3})
    finally:
        assert server.stop() == 0
    text = server.log()
    assert "hunter2" not in text
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    (mine,) = [line for line in lines if line.get("request_id") == "mine-1"]
    assert mine["status"] == 200 and mine["logger"] == "anychip.http" and mine["seconds"] > 0


def samples(metrics: Metrics) -> dict[str, float]:
    return {s.name: s.value for f in text_string_to_metric_families(metrics.render().decode()) for s in f.samples}


def test_a_new_engine_counts_from_nothing_whatever_the_last_one_counted():
    metrics = Metrics("m")
    metrics.engine_started(100)
    metrics.take(EngineStats(2, 1, 5, 20, 100, steps=5, preemptions=3, prefix_queries=64, prefix_hits=32))
    metrics.engine_ended()
    gone = samples(metrics)
    assert (
        gone["anychip_engine_up"] == gone["anychip_num_requests_running"] == gone["anychip_kv_cache_usage_ratio"] == 0
    )
    metrics.engine_started(100)
    # More steps than the last one lived to make, and fewer of everything else.
    metrics.take(EngineStats(1, 0, 0, 10, 100, steps=6, preemptions=1, prefix_queries=16, prefix_hits=0))
    now = samples(metrics)
    assert now["anychip_engine_steps_total"] == 11 and now["anychip_num_preemptions_total"] == 4
    assert now["anychip_prefix_cache_queries_total"] == 80 and now["anychip_prefix_cache_hits_total"] == 32


def test_the_pool_of_states_has_gauges_of_its_own():
    metrics = Metrics("m")
    metrics.engine_started(100)
    metrics.take(EngineStats(2, 1, 5, 20, 100, 5, 0, 0, 0, states_used=3, states=12))
    now = samples(metrics)
    assert (now["anychip_state_cache_usage_ratio"], now["anychip_state_cache_blocks"]) == (0.25, 12)
    metrics.engine_ended()
    assert samples(metrics)["anychip_state_cache_usage_ratio"] == 0


def test_spans_follow_the_stations_and_the_callers_trace():
    exporter = InMemorySpanExporter()

    async def run() -> None:
        llm = AsyncLLM(EngineConfig(device="cpu", num_kv_blocks=128))
        llm.tracer = Tracer("", "quickstart", exporter)
        await llm.start()
        try:
            trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
            options = RequestOptions(trace_headers=trace)
            async for _ in await llm.accept("r-1", "import os", SamplingParams(max_tokens=4), options):
                pass
            with pytest.raises(InvalidRequest):
                await llm.accept("r-2", "", SamplingParams(max_tokens=4), options)
        finally:
            await llm.close()

    asyncio.run(run())
    spans = {span.name: span for span in exporter.get_finished_spans()}
    order = ["input", "queue", "prefill", "decode", "output"]
    root = spans["anychip.request"]
    assert f"{root.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert root.attributes["gen_ai.usage.output_tokens"] == 4
    stages = [spans[f"anychip.{name}"] for name in order]
    assert all(stage.parent.span_id == root.context.span_id for stage in stages)
    moments = [root.start_time] + [moment for stage in stages for moment in (stage.start_time, stage.end_time)]
    assert moments == sorted(moments) and root.end_time >= moments[-1]


def test_kernels_say_who_serves_them(server):
    found = server.client.get("/debug/kernels").json()
    assert found["ops"]["sample"].startswith("cpu (") and found["ops"]["rotary"] == "reference: no override"
    assert found["device"] == "cpu:0"
