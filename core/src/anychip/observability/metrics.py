"""Prometheus metrics of one server, under `anychip_`; names follow vLLM's, so that dashboards carry over."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

import anychip
from anychip.engine.outputs import RequestOutput
from anychip.engine_stats import EngineStats, SpeculationStats
from anychip.observability.tracing import RequestTimes

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)

_NEW_ENGINE = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0)


class Metrics:
    """One registry per server: two in one process do not mix."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model}
        self._last = _NEW_ENGINE
        self.running = self._gauge("num_requests_running", "Requests that hold a slot")
        self.waiting = self._gauge("num_requests_waiting", "Requests that wait for a slot")
        self.kv_usage = self._gauge("kv_cache_usage_ratio", "Share of KV blocks in use")
        self.kv_blocks = self._gauge("kv_cache_blocks", "KV blocks that there are")
        self.state_usage = self._gauge("state_cache_usage_ratio", "Share of state blocks that sequences hold")
        self.state_blocks = self._gauge("state_cache_blocks", "State blocks that there are; 0: the model has no states")
        self.up = self._gauge("engine_up", "1 while an engine is ready")
        self.progress = self._gauge("engine_last_progress_seconds", "Unix time of the engine's last sign of life")
        self.steps = self._counter("engine_steps", "Steps launched")
        self.restarts = self._counter("engine_restarts", "Times that a dead engine was started again")
        self.queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self.hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self.preemptions = self._counter("num_preemptions", "Requests whose blocks were taken from them")
        self.drafted = self._counter("spec_decode_num_draft_tokens", "Tokens drafted")
        self.accepted = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "Drafted tokens that were drawn, by position", "position"
        )
        self.saved = self._gauge("spec_decode_saved_seconds", "What drafts saved since the engine's start")
        self.proposer_failures = self._counter("spec_decode_failures", "Sequences whose proposer failed")
        self.expert_imbalance = self._gauge(
            "expert_imbalance_ratio", "Tokens routed to the busiest rank's experts over the mean of the ranks"
        )
        self.expert_moves = self._counter("expert_moves", "Slots that got another expert")
        lane = (*self._labels, "lane")
        self.lane_running = Gauge(
            "anychip_lane_num_requests_running", "Requests of a lane that hold a slot", lane, registry=self.registry
        )
        self.lane_kv_usage = Gauge(
            "anychip_lane_kv_cache_usage_ratio", "Share of a lane's KV blocks in use", lane, registry=self.registry
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of the requests that were begun")
        self.finished = self._counter("request_success", "Sequences that ended, by reason", "finished_reason")
        self.failed = self._counter("request_failure", "Requests that ended with an error, by its kind", "error")
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token", _SECONDS)
        self.tokens = TokenFigures(self._labels)
        self.registry.register(self.tokens)
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "From arrival to the end", _SECONDS)
        self.queue_time = self._histogram("request_queue_time_seconds", "Until first scheduled", _SECONDS)
        self.prefill_time = self._histogram("request_prefill_time_seconds", "Scheduled to first token", _SECONDS)
        self.decode_time = self._histogram("request_decode_time_seconds", "First token to the end", _SECONDS)
        self.prompt_length = self._histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self.output_length = self._histogram("request_generation_tokens", "Tokens of a request's answers", _TOKENS)
        http = ("method", "route", "status")
        self.http_requests = Counter("anychip_http_requests", "HTTP requests", http, registry=self.registry)
        self.http_seconds = Histogram(
            "anychip_http_request_duration_seconds", "Until the response ended", ("route",), buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._adapters = Gauge(
            "anychip_adapter_info", "Adapters that requests may ask for", ("adapter", "digest"), registry=self.registry
        )
        info = Gauge("anychip_info", "What serves", ("version", "model_name"), registry=self.registry)
        info.labels(anychip.__version__, model).set(1)

    @property
    def last(self) -> EngineStats:
        """The engine's newest word."""
        return self._last

    def render(self) -> bytes:
        """The scrape's text."""
        return generate_latest(self.registry)

    def adapter_loaded(self, name: str, digest: bytes) -> None:
        """Requests may ask for it from now on."""
        self._adapters.labels(name, digest.hex()).set(1)

    def adapter_gone(self, name: str, digest: bytes) -> None:
        """The name stands for these contents no more."""
        self._adapters.remove(name, digest.hex())

    def engine_started(self, num_blocks: int) -> None:
        """A new engine is ready. It counts from 0, whatever the one before had counted."""
        self._last = _NEW_ENGINE
        self.kv_blocks.set(num_blocks)
        self.up.set(1)

    def engine_ended(self) -> None:
        """The engine is gone, and what it held with it."""
        self.up.set(0)
        for gauge in (self.running, self.waiting, self.kv_usage, self.state_usage):
            gauge.set(0)
        for lanes in (self.lane_running, self.lane_kv_usage):
            lanes.clear()

    def take(self, stats: EngineStats) -> None:
        """The engine's word, which may be older than the last: its threads do not wait for each other."""
        last, self._last = self._last, _counted(self._last, stats)
        self.running.set(stats.running)
        self.waiting.set(stats.waiting)
        self.kv_usage.set(stats.kv_blocks_used / max(1, stats.kv_blocks))
        self.kv_blocks.set(stats.kv_blocks)
        for index, lane in enumerate(stats.lanes):
            labels = {**self._labels, "lane": str(index)}
            self.lane_running.labels(**labels).set(lane.running)
            self.lane_kv_usage.labels(**labels).set(lane.kv_blocks_used / max(1, lane.kv_blocks))
        self.state_usage.set(stats.states_used / max(1, stats.states))
        self.state_blocks.set(stats.states)
        self.progress.set(time.time())
        self.steps.inc(self._last.steps - last.steps)
        self.queries.inc(self._last.prefix_queries - last.prefix_queries)
        self.hits.inc(self._last.prefix_hits - last.prefix_hits)
        self.preemptions.inc(self._last.preemptions - last.preemptions)
        if self._last.speculation is not None:
            self._take_speculation(last.speculation, self._last.speculation)
        if self._last.experts is not None:
            self.expert_imbalance.set(self._last.experts.imbalance)
            self.expert_moves.inc(self._last.experts.moved - (last.experts.moved if last.experts else 0))

    def _take_speculation(self, last: SpeculationStats | None, stats: SpeculationStats) -> None:
        before = last or SpeculationStats(0, (0,) * len(stats.accepted_at), 0.0, 0)
        self.drafted.inc(stats.drafted - before.drafted)
        self.proposer_failures.inc(stats.failures - before.failures)
        self.saved.set(stats.saved_s)
        for position, (count, old) in enumerate(zip(stats.accepted_at, before.accepted_at, strict=True)):
            if count > old:  # a position has its series from its first token on
                self.accepted.labels(**self._labels, position=str(position)).inc(count - old)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"anychip_{name}", text, tuple(self._labels), registry=self.registry).labels(**self._labels)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        made = Counter(f"anychip_{name}", text, (*self._labels, *labels), registry=self.registry)
        return made if labels else made.labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"anychip_{name}", text, tuple(self._labels), buckets=buckets, registry=self.registry)
        return made.labels(**self._labels)


def _counted(last: EngineStats, stats: EngineStats) -> EngineStats:
    """The newer of two words, by every count: none of them ever falls."""
    counts = ("steps", "preemptions", "prefix_queries", "prefix_hits")
    newest = {name: max(getattr(last, name), getattr(stats, name)) for name in counts}
    drafts = [each for each in (last.speculation, stats.speculation) if each is not None]
    looks = [each for each in (stats.experts, last.experts) if each is not None]
    newest["experts"] = max(looks, key=lambda each: each.moved, default=None)
    newest["speculation"] = max(drafts, key=lambda each: (each.drafted, each.accepted, each.failures), default=None)
    return msgspec.structs.replace(stats, **newest)


class TokenFigures:
    """What is counted for every token: plain numbers of one thread, in Prometheus's form when they are asked for.
    prometheus_client's own counters take locks, and longer than the rest of what is done for a token."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self._tokens = 0
        self._counts = [0] * (len(_STEPS) + 1)  # by interval; the last one is of longer ones
        self._seconds = 0.0

    def add(self, count: int, seconds: float | None) -> None:
        """So many tokens of a sequence came at once, that many seconds after those before; None: they are its first."""
        self._tokens += count
        if seconds is not None and count:
            self._counts[bisect_left(_STEPS, seconds / count)] += count
            self._seconds += seconds

    def collect(self) -> Iterator[Metric]:
        """prometheus_client's protocol of a collector."""
        names, values = tuple(self._labels), tuple(self._labels.values())
        tokens = CounterMetricFamily("anychip_generation_tokens", "Tokens generated", labels=names)
        tokens.add_metric(values, self._tokens)
        yield tokens
        between = HistogramMetricFamily(
            "anychip_inter_token_latency_seconds", "Between a sequence's tokens", labels=names
        )
        bounds = [*(str(float(bound)) for bound in _STEPS), "+Inf"]
        between.add_metric(values, list(zip(bounds, accumulate(self._counts), strict=True)), self._seconds)
        yield between


class RequestClock:
    """One request's times, as its caller sees them."""

    def __init__(self, metrics: Metrics, model: str, arrived: float) -> None:
        """`arrived` on the monotonic clock."""
        self._metrics = metrics
        self._model = model
        self.arrived = arrived
        self.accepted = time.monotonic()
        self.first: float | None = None
        self.last = self.arrived
        self.queued_s: float | None = None
        self.ended = 0.0
        self.num_prompt = 0
        self.num_output = 0
        self._newest: dict[int, float] = {}

    def piece(self, output: RequestOutput) -> None:
        """New tokens."""
        now, metrics = time.monotonic(), self._metrics
        self.last = now
        if self.first is None:
            self.first, self.num_prompt = now, len(output.prompt_token_ids)
            metrics.first_token.observe(now - self.arrived)
            metrics.prompt_tokens.inc(self.num_prompt)
            metrics.prompt_length.observe(self.num_prompt)
        if output.queued_s is not None and self.queued_s is None:
            self.queued_s = output.queued_s
            metrics.queue_time.observe(output.queued_s)
            metrics.prefill_time.observe(max(0.0, now - self.arrived - output.queued_s))
        for sequence in output.outputs:
            count = len(sequence.token_ids)
            before = self._newest.get(sequence.index)
            metrics.tokens.add(count, None if before is None else now - before)
            self._newest[sequence.index] = now
            self.num_output += count
            if sequence.finish_reason is not None:
                metrics.finished.labels(self._model, sequence.finish_reason).inc()

    def end(self, error: BaseException | None) -> None:
        """The request is over."""
        metrics = self._metrics
        metrics.end_to_end.observe(self.last - self.arrived if error is None else time.monotonic() - self.arrived)
        if self.first is not None:
            metrics.decode_time.observe(self.last - self.first)
            metrics.output_length.observe(self.num_output)
        self.ended = time.monotonic()
        if error is not None:
            metrics.failed.labels(self._model, type(error).__name__).inc()

    @property
    def times(self) -> RequestTimes:
        """Once it has ended."""
        return RequestTimes(
            arrived=self.arrived,
            accepted=self.accepted,
            scheduled=None if self.queued_s is None else self.accepted + self.queued_s,
            first_token=self.first,
            last_token=None if self.first is None else self.last,
            ended=self.ended,
        )
