"""`python -m extract` and `llava-extract`."""

from __future__ import annotations

from extract.config import (
    BenchConfig,
    InspectConfig,
    RetryConfig,
    RunConfig,
    VerifyConfig,
)
from extract.curate.config import CurateConfig
from llava_core.cli import command
from llava_core.cli.options import Command

COMMANDS = {
    "run": Command(
        RunConfig,
        "extract.run:run",
        continues=True,
        example="--data sa1b --vision models/clip --out features/train --limit 100000",
        subject="data",
    ),
    "retry-failed": Command(
        RetryConfig,
        "extract.run:retry_failed",
        continues=True,
        example="features/train --vision models/clip --status timeout http-5xx",
        subject="out",
    ),
    "verify": Command(
        VerifyConfig,
        "extract.verify:run",
        example="features/train --vision models/clip",
        subject="out",
    ),
    "inspect": Command(
        InspectConfig,
        "extract.inspect.command:run",
        example="features/train --html train.html",
        subject="out",
    ),
    "curate": Command(
        CurateConfig,
        "extract.curate.command:run",
        example="features/train --vision models/clip --out rows.parquet --html rows.html",
        subject="features",
    ),
    "bench": Command(
        BenchConfig,
        "extract.bench.command:run",
        example="--data sa1b --vision models/clip",
        subject="data",
    ),
}


def main() -> None:
    command.main("python -m extract", "Encode images once, into feature shards.", COMMANDS)


if __name__ == "__main__":
    main()
