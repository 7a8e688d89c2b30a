"""Writes docs/grafana/anychip.json: a dashboard over the server's metrics, one panel a question.

python tools/grafana_dashboard.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[1] / "docs/grafana/anychip.json"
BY_MODEL = '{model_name="$model"}'
WIDTH, HEIGHT, COLUMNS = 8, 8, 24


def rate(metric: str) -> str:
    return f"sum(rate({metric}{BY_MODEL}[$__rate_interval]))"


def quantiles(histogram: str) -> list[tuple[str, str]]:
    buckets = f"sum by (le) (rate({histogram}_bucket{BY_MODEL}[$__rate_interval]))"
    return [(f"p{round(share * 100)}", f"histogram_quantile({share}, {buckets})") for share in (0.5, 0.9, 0.99)]


PANELS: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("Tokens per second", "short", [
        ("output", rate("anychip_generation_tokens_total")), ("prompt", rate("anychip_prompt_tokens_total")),
    ]),
    ("Requests", "short", [
        ("running", f"sum(anychip_num_requests_running{BY_MODEL})"),
        ("waiting", f"sum(anychip_num_requests_waiting{BY_MODEL})"),
    ]),
    ("KV cache used", "percentunit", [("used", f"avg(anychip_kv_cache_usage_ratio{BY_MODEL})")]),
    ("Time to first token", "s", quantiles("anychip_time_to_first_token_seconds")),
    ("Between tokens", "s", quantiles("anychip_inter_token_latency_seconds")),
    ("Whole request", "s", quantiles("anychip_e2e_request_latency_seconds")),
    ("Queue", "s", quantiles("anychip_request_queue_time_seconds")),
    ("Prefill", "s", quantiles("anychip_request_prefill_time_seconds")),
    ("Decode", "s", quantiles("anychip_request_decode_time_seconds")),
    ("Prefix cache hits", "percentunit", [
        ("share", f"{rate('anychip_prefix_cache_hits_total')} / {rate('anychip_prefix_cache_queries_total')}"),
    ]),
    ("Ends", "short", [
        ("{{finished_reason}}",
         f"sum by (finished_reason) (rate(anychip_request_success_total{BY_MODEL}[$__rate_interval]))"),
        ("error {{error}}", f"sum by (error) (rate(anychip_request_failure_total{BY_MODEL}[$__rate_interval]))"),
    ]),
    ("HTTP status", "short", [
        ("{{status}}", "sum by (status) (rate(anychip_http_requests_total[$__rate_interval]))"),
    ]),
    ("Prompt length", "short", quantiles("anychip_request_prompt_tokens")),
    ("Answer length", "short", quantiles("anychip_request_generation_tokens")),
    ("Trouble", "short", [
        ("engine restarts", f"sum(anychip_engine_restarts_total{BY_MODEL})"),
        ("engines up", f"sum(anychip_engine_up{BY_MODEL})"),
        ("preemptions a second", rate("anychip_num_preemptions_total")),
    ]),
]  # fmt: skip


def panel(number: int, title: str, unit: str, queries: list[tuple[str, str]]) -> dict[str, Any]:
    per_row = COLUMNS // WIDTH
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "gridPos": {"x": number % per_row * WIDTH, "y": number // per_row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend}
            for index, (legend, expression) in enumerate(queries)
        ],
    }


def dashboard() -> dict[str, Any]:
    """As Grafana imports it."""
    return {
        "title": "anychip",
        "uid": "anychip",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                {
                    "name": "model",
                    "type": "query",
                    "datasource": {"type": "prometheus", "uid": "$datasource"},
                    "query": "label_values(anychip_info, model_name)",
                },
            ]
        },
        "panels": [panel(number, *fields) for number, fields in enumerate(PANELS)],
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(dashboard(), indent=1) + "\n")
