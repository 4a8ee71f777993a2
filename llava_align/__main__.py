"""`python -m llava_align` and `llava`: tools around the three phases."""

from __future__ import annotations

from extract.config import ExamplesConfig
from infer.chat.config import ChatLlmConfig
from llava_align.config import DemoConfig, DemoStage2Config, DoctorConfig, MatchConfig, TraceConfig
from llava_align.hub.config import DownloadConfig, ExportConfig, ImportConfig, PushConfig
from llava_core.cli import command
from llava_core.cli.options import Command

ALIGNED = "runs/linear/best --vision models/clip --llm models/qwen3"
"""A checkpoint and its models, as the examples name them."""
COMMANDS = {
    "demo": Command(
        DemoConfig,
        "llava_align.demo.command:run",
        example="--out demo-out",
    ),
    "demo-stage2": Command(
        DemoStage2Config,
        "llava_align.demo.stage2:run",
        example="--out demo-out --tune lora",
    ),
    "trace": Command(
        TraceConfig,
        "llava_align.demo.trace:run",
        example=f"photo.jpg --caption 一只猫 --checkpoint {ALIGNED}",
        subject="image",
    ),
    "examples": Command(
        ExamplesConfig,
        "extract.examples:run",
        example="sa1b --out examples --count 16",
        subject="data",
    ),
    "match": Command(
        MatchConfig,
        "llava_align.match.command:run",
        example="pictures --vision models/clip --text 一只猫",
        subject="images",
    ),
    "chat-llm": Command(
        ChatLlmConfig,
        "infer.chat.chat_llm:run",
        example="models/qwen3",
        subject="llm",
    ),
    "import": Command(
        ImportConfig,
        "llava_align.hub.import_projector:run",
        example="stage1_projection.pt --vision models/clip --llm models/qwen3 --out runs/course",
        subject="file",
    ),
    "push": Command(
        PushConfig,
        "llava_align.hub.push:run",
        continues=True,
        example="runs/linear/best --to modelscope --name you/projector",
        subject="folder",
    ),
    "export": Command(
        ExportConfig,
        "llava_align.hub.export:run",
        example=f"{ALIGNED} --out exported --to gguf",
        subject="checkpoint",
    ),
    "doctor": Command(
        DoctorConfig,
        "llava_align.doctor.command:run",
        example="",
    ),
    "download": Command(
        DownloadConfig,
        "llava_align.hub.download:run",
        continues=True,
        example="models",
        subject="what",
    ),
}


def main() -> None:
    command.main(
        "llava",
        "Tools around the phases, which are python -m extract, python -m train and python -m infer.",
        COMMANDS,
    )


if __name__ == "__main__":
    main()
