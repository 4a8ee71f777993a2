"""Metrics of the server for Prometheus, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

BOUNDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Upper bounds of the histograms' buckets, in seconds."""


class Metrics:
    """Counters and histograms since the start, gauges, and the process' memory and CPU time (on Linux)."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "llava_requests", "Requests by HTTP status; 499: the client left.", ["status"], registry=registry
        )
        """Requests for answers and embeddings."""
        self._prompt, self._cached, self._completion = (
            Counter(f"llava_{name}_tokens", what, registry=registry)
            for name, what in (
                ("prompt", "Tokens of prompts, pictures among them."),
                ("cached", "Tokens of prompts that the model had read before."),
                ("completion", "Tokens of answers."),
            )
        )
        self.first_token, self._whole = (
            Histogram(f"llava_{name}_seconds", what, registry=registry, buckets=BOUNDS)
            for name, what in (
                ("first_token", "From a request to the first text of its answer."),
                ("request", "From a request to the end of its answer."),
            )
        )

    def add(self, seconds: float, prompt: int, cached: int, completion: int) -> None:
        """Count a complete answer."""
        self._whole.observe(seconds)
        self._prompt.inc(prompt)
        self._cached.inc(cached)
        self._completion.inc(completion)

    def gauge(self, name: str, what: str) -> Gauge:
        """A gauge `llava_NAME`."""
        return Gauge(f"llava_{name}", what, registry=self.registry)

    def total(self, name: str, **labels: str) -> int:
        """Sum of the counter `llava_NAME_total` over what has these labels."""
        samples = [sample for metric in self.registry.collect() for sample in metric.samples]
        mine = [sample for sample in samples if sample.name == f"llava_{name}_total"]
        return int(sum(sample.value for sample in mine if labels.items() <= sample.labels.items()))
