from __future__ import annotations

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from infer.serve.prometheus import Metrics


def test_what_the_library_reads_back() -> None:
    metrics = Metrics()
    for status in (200, 200, 429):
        metrics.requests.labels(status).inc()
    for seconds in (0.05, 0.06, 1e4):
        metrics.first_token.observe(seconds)
        metrics.add(seconds, prompt=10, cached=4, completion=3)
    metrics.gauge("slots_busy", "Answers.").set_function(lambda: 2)
    families = list(text_string_to_metric_families(generate_latest(metrics.registry).decode()))
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }
    expected = {
        ("llava_requests_total", "200"): 2,
        ("llava_requests_total", "429"): 1,
        ("llava_prompt_tokens_total",): 30,
        ("llava_cached_tokens_total",): 12,
        ("llava_completion_tokens_total",): 9,
        ("llava_slots_busy",): 2,
        ("llava_first_token_seconds_bucket", "0.05"): 1,  # a bound belongs to its bucket
        ("llava_first_token_seconds_bucket", "0.1"): 2,
        ("llava_first_token_seconds_bucket", "120.0"): 2,
        ("llava_request_seconds_bucket", "+Inf"): 3,
        ("llava_request_seconds_count",): 3,
        ("llava_request_seconds_sum",): 10000.11,
    }
    assert {key: samples.get(key) for key in expected} == expected
    assert metrics.total("requests") == 3
    assert metrics.total("requests", status="200") == 2
    assert metrics.total("completion_tokens") == 9
