"""Metrics of the server in Prometheus' text format."""

from __future__ import annotations

import bisect
import collections
from collections.abc import Iterator, Mapping

BOUNDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Upper bounds of the histograms' buckets, in seconds."""


class Seconds:
    """A histogram of durations."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        below = 0
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {below}"


class Metrics:
    """Counters and histograms since the start; gauges are passed to `text`."""

    def __init__(self) -> None:
        self.requests: collections.Counter[int] = collections.Counter()
        """Requests for answers and embeddings by HTTP status; 499: the client left."""
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self.first_token = Seconds()
        """From the request to the first text of its answer."""
        self.whole = Seconds()
        """From the request to the end of its answer."""

    def add(self, seconds: float, prompt: int, cached: int, completion: int) -> None:
        """Count a complete answer."""
        self.whole.add(seconds)
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        self.completion_tokens += completion

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """The metrics, and `gauges` by name as (help, value)."""
        lines = ["# HELP llava_requests_total Requests by HTTP status; 499: the client left."]
        lines.append("# TYPE llava_requests_total counter")
        lines += [f'llava_requests_total{{status="{code}"}} {n}' for code, n in sorted(self.requests.items())]
        for name, what, count in (
            ("prompt", "Tokens of prompts, pictures among them.", self.prompt_tokens),
            ("cached", "Tokens of prompts that the model had read before.", self.cached_tokens),
            ("completion", "Tokens of answers.", self.completion_tokens),
        ):
            lines += _block(f"llava_{name}_tokens_total", what, "counter")
            lines.append(f"llava_{name}_tokens_total {count}")
        for name, (what, value) in gauges.items():
            lines += [*_block(f"llava_{name}", what, "gauge"), f"llava_{name} {value:g}"]
        for name, what, seconds in (
            ("first_token", "From a request to the first text of its answer.", self.first_token),
            ("request", "From a request to the end of its answer.", self.whole),
        ):
            lines += [*_block(f"llava_{name}_seconds", what, "histogram")]
            lines += seconds.lines(f"llava_{name}_seconds")
        return "\n".join(lines) + "\n"


def _block(name: str, what: str, kind: str) -> list[str]:
    return [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
