"""`python -m infer` and `llava-infer`."""

from __future__ import annotations

from infer.benchmark.config import BenchmarkConfig
from infer.chat.config import ChatConfig
from infer.config import AskConfig, BatchConfig, LensConfig, RankConfig, ScoreConfig
from infer.serve.config import ServeConfig
from llava_core.cli import command
from llava_core.cli.options import Command

ALIGNED = "runs/linear/best --vision models/clip --llm models/qwen3"
"""A checkpoint and its models, as the examples name them."""
COMMANDS = {
    "ask": Command(
        AskConfig,
        "infer.ask:run",
        example=f"photo.jpg --checkpoint {ALIGNED}",
        subject="image",
    ),
    "chat": Command(
        ChatConfig,
        "infer.chat.command:run",
        example=f"{ALIGNED} --image photo.jpg",
        subject="checkpoint",
    ),
    "batch": Command(
        BatchConfig,
        "infer.batch.command:run",
        continues=True,
        example=f"questions.jsonl --checkpoint {ALIGNED} --output answers.jsonl",
        subject="input",
    ),
    "rank": Command(
        RankConfig,
        "infer.rank.command:run",
        continues=True,
        example="--checkpoint runs/linear/best --llm models/qwen3 --features features/eval --output r.jsonl",
        subject="input",
    ),
    "serve": Command(
        ServeConfig,
        "infer.serve.server:run",
        example=f"{ALIGNED} --port 8000",
        subject="checkpoint",
    ),
    "score": Command(
        ScoreConfig,
        "infer.score.command:run",
        example="answers.jsonl",
        subject="input",
    ),
    "benchmark": Command(
        BenchmarkConfig,
        "infer.benchmark.command:run",
        continues=True,
        example=f"MMBench_DEV_CN.tsv --checkpoint {ALIGNED} --output answers.jsonl",
        subject="task",
    ),
    "lens": Command(
        LensConfig,
        "infer.lens.command:run",
        example=f"photo.jpg --checkpoint {ALIGNED}",
        subject="image",
    ),
}


def main() -> None:
    command.main("python -m infer", "Ask a trained projector about live images.", COMMANDS)


if __name__ == "__main__":
    main()
