"""`python -m llava_align` and `llava`: what belongs to no single phase."""

from __future__ import annotations

from extract.config import ExamplesConfig
from infer.config import ChatLlmConfig
from llava_align.config import (
    DemoConfig,
    DoctorConfig,
    DownloadConfig,
    ExportConfig,
    ImportConfig,
    MatchConfig,
    PushConfig,
    TraceConfig,
)
from llava_core.cli import command as cli

COMMANDS = {
    "demo": cli.Command(DemoConfig, "llava_align.demo.command:run"),
    "trace": cli.Command(TraceConfig, "llava_align.demo.trace:run"),
    "examples": cli.Command(ExamplesConfig, "extract.examples:run"),
    "match": cli.Command(MatchConfig, "llava_align.match.command:run"),
    "chat-llm": cli.Command(ChatLlmConfig, "infer.chat.chat_llm:run"),
    "import": cli.Command(ImportConfig, "llava_align.hub.import_projector:run"),
    "push": cli.Command(PushConfig, "llava_align.hub.push:run", continues=True),
    "export": cli.Command(ExportConfig, "llava_align.hub.export:run"),
    "doctor": cli.Command(DoctorConfig, "llava_align.doctor.command:run"),
    "download": cli.Command(DownloadConfig, "llava_align.hub.download:run", continues=True),
}


def main() -> None:
    cli.main("llava", "What belongs to no single phase: see extract, train and infer for those.", COMMANDS)


if __name__ == "__main__":
    main()
