from __future__ import annotations

import re

from infer.serve.prometheus import Metrics


def test_the_text_form() -> None:
    metrics = Metrics()
    metrics.requests.update([200, 200, 429])
    for seconds in (0.05, 0.06, 1e4):
        metrics.first_token.add(seconds)
        metrics.add(seconds, prompt=10, cached=4, completion=3)
    text = metrics.text({"slots_busy": ("Answers.", 2)})
    lines = text.splitlines()
    for expected in (
        'llava_requests_total{status="200"} 2',
        'llava_requests_total{status="429"} 1',
        "llava_prompt_tokens_total 30",
        "llava_cached_tokens_total 12",
        "llava_completion_tokens_total 9",
        "llava_slots_busy 2",
        'llava_first_token_seconds_bucket{le="0.05"} 1',  # a bound belongs to its bucket
        'llava_first_token_seconds_bucket{le="0.1"} 2',
        'llava_first_token_seconds_bucket{le="120"} 2',
        'llava_request_seconds_bucket{le="+Inf"} 3',
        "llava_request_seconds_count 3",
        "llava_request_seconds_sum 10000.110000",
    ):
        assert expected in lines
    names = [re.split("[{ ]", line)[0] for line in lines if not line.startswith("#")]
    typed = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in names} == typed
    assert text.endswith("\n")
