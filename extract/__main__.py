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
    "run": Command(RunConfig, "extract.run:run", continues=True),
    "retry-failed": Command(RetryConfig, "extract.run:retry_failed", continues=True),
    "verify": Command(VerifyConfig, "extract.verify:run"),
    "inspect": Command(InspectConfig, "extract.inspect.command:run"),
    "curate": Command(CurateConfig, "extract.curate.command:run"),
    "bench": Command(BenchConfig, "extract.bench.command:run"),
}


def main() -> None:
    command.main("llava-extract", "Encode images once, into feature shards.", COMMANDS)


if __name__ == "__main__":
    main()
