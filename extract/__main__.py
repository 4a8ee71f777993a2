"""`python -m extract` and `llava-extract`."""

from __future__ import annotations

from extract.config import BenchConfig, InspectConfig, RetryConfig, RunConfig, VerifyConfig
from llava_core.cli import command as cli

COMMANDS = {
    "run": cli.Command(RunConfig, "extract.run:run", continues=True),
    "retry-failed": cli.Command(RetryConfig, "extract.run:retry_failed", continues=True),
    "verify": cli.Command(VerifyConfig, "extract.verify:run"),
    "inspect": cli.Command(InspectConfig, "extract.inspect.command:run"),
    "bench": cli.Command(BenchConfig, "extract.bench:run"),
}


def main() -> None:
    cli.main("llava-extract", "Encode images once, into feature shards.", COMMANDS)


if __name__ == "__main__":
    main()
