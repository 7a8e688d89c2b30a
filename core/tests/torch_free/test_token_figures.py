"""What is counted for every token, as Prometheus is told it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from anychip.observability.metrics import _STEPS, Metrics

SECONDS = st.one_of(st.floats(0, 20), st.sampled_from(_STEPS))


@given(st.lists(st.tuples(st.integers(0, 4), st.one_of(st.none(), SECONDS)), max_size=20))
def test_tokens_and_intervals_are_counted_as_a_histogram_counts_them(pieces):
    metrics, plain = Metrics("m"), CollectorRegistry()
    histogram = Histogram("x", "x", buckets=_STEPS, registry=plain)
    for count, seconds in pieces:
        metrics.tokens.add(count, seconds)
        for _ in range(count if seconds is not None else 0):
            histogram.observe(seconds / count)
    labels, name = {"model_name": "m"}, "anychip_inter_token_latency_seconds"
    assert metrics.registry.get_sample_value("anychip_generation_tokens_total", labels) == sum(c for c, _ in pieces)
    for family in plain.collect():
        for sample in family.samples:
            if sample.name in ("x_bucket", "x_count"):
                told = metrics.registry.get_sample_value(name + sample.name[1:], labels | sample.labels)
                assert told == sample.value, sample
