"""`python -m infer` and `llava-infer`."""

from __future__ import annotations

from infer.benchmark.config import BenchmarkConfig
from infer.chat.config import ChatConfig
from infer.config import AskConfig, BatchConfig, LensConfig, RankConfig, ScoreConfig
from infer.serve.config import ServeConfig
from llava_core.cli import command
from llava_core.cli.options import Command

COMMANDS = {
    "ask": Command(AskConfig, "infer.ask:run"),
    "chat": Command(ChatConfig, "infer.chat.command:run"),
    "batch": Command(BatchConfig, "infer.batch.command:run", continues=True),
    "rank": Command(RankConfig, "infer.rank.command:run", continues=True),
    "serve": Command(ServeConfig, "infer.serve.server:run"),
    "score": Command(ScoreConfig, "infer.score.command:run"),
    "benchmark": Command(BenchmarkConfig, "infer.benchmark.command:run", continues=True),
    "lens": Command(LensConfig, "infer.lens.command:run"),
}


def main() -> None:
    command.main("llava-infer", "Ask a trained projector about live images.", COMMANDS)


if __name__ == "__main__":
    main()
