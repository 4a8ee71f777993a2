"""`python -m llava_align` and `llava`: tools around the three phases."""

from __future__ import annotations

from extract.config import ExamplesConfig
from infer.chat.config import ChatLlmConfig
from llava_align.config import DemoConfig, DemoStage2Config, DoctorConfig, MatchConfig, TraceConfig
from llava_align.hub.config import DownloadConfig, ExportConfig, ImportConfig, PushConfig
from llava_core.cli import command
from llava_core.cli.options import Command

COMMANDS = {
    "demo": Command(DemoConfig, "llava_align.demo.command:run"),
    "demo-stage2": Command(DemoStage2Config, "llava_align.demo.stage2:run"),
    "trace": Command(TraceConfig, "llava_align.demo.trace:run"),
    "examples": Command(ExamplesConfig, "extract.examples:run"),
    "match": Command(MatchConfig, "llava_align.match.command:run"),
    "chat-llm": Command(ChatLlmConfig, "infer.chat.chat_llm:run"),
    "import": Command(ImportConfig, "llava_align.hub.import_projector:run"),
    "push": Command(PushConfig, "llava_align.hub.push:run", continues=True),
    "export": Command(ExportConfig, "llava_align.hub.export:run"),
    "doctor": Command(DoctorConfig, "llava_align.doctor.command:run"),
    "download": Command(DownloadConfig, "llava_align.hub.download:run", continues=True),
}


def main() -> None:
    command.main("llava", "Tools around the three phases: demo, download, doctor, …", COMMANDS)


if __name__ == "__main__":
    main()
