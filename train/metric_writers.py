"""Writers of metrics: metrics.jsonl always, TensorBoard and Weights & Biases when asked."""

from __future__ import annotations

import json
import math
import netrc
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from llava_core.cli.console import counted, say
from llava_core.errors import LlavaError, first_line
from llava_core.filesystem import replace_text
from llava_core.types import JsonDict


class MetricWriter(Protocol):
    """Takes metrics: numbers, and lists of rows of text (`eval_captions`)."""

    def log(self, step: int, metrics: JsonDict) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line, `step` first; a resumed run drops what came after its checkpoint."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = []
        if path.exists() and resume_step:
            lines = path.read_text(encoding="utf-8").split("\n")
            kept = [line for line in lines if _step(line) <= resume_step]
        replace_text(path, "".join(line + "\n" for line in kept))
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, step: int, metrics: JsonDict) -> None:
        self.file.write(json.dumps({"step": step, **metrics}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Scalars in groups, which it shows by the alphabet: eval/, train/, uncertainty/ (ends of intervals) and
    utilisation/; as texts the answers, and how the run began."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise LlavaError("--report-to tensorboard", do="pip install 'llava-align[tensorboard]'") from None
        # What a killed run reported after its checkpoint is reported again.
        self.writer: Any = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def log(self, step: int, metrics: JsonDict) -> None:
        if "attention" in metrics:  # the first line
            self.writer.add_text(
                "setup", "\n".join(f"- {key}: {value}" for key, value in metrics.items()), step
            )
            return
        for name, value in metrics.items():
            if isinstance(value, list):
                self.writer.add_text("answers", "\n\n".join(map(_answer, value)), step)
            elif isinstance(value, (int, float)) and name != "eval_step":
                self.writer.add_scalar(_tag(name), value, step)

    def close(self) -> None:
        self.writer.close()


def _tag(name: str) -> str:
    if name.startswith("eval_"):
        group = "uncertainty" if name.endswith(("_low", "_high")) else "eval"
        return f"{group}/{name.removeprefix('eval_')}"
    return name if "/" in name else f"{'train' if name in ('loss', 'lr') else 'utilisation'}/{name}"


def _answer(line: JsonDict) -> str:
    """Markdown of one of `eval_captions`."""
    answer = line["generated"] + ("…" if line["cut"] else "")
    rows = (f"**{line['row']}** {line['question']}", f"truth: {line['written']}", f"answer: {answer}")
    return "  \n".join(rows)


class WeightsAndBiases:
    """Offline without an API key, so that no run ever waits at a login prompt.

    A run that continues, after a kill as well, is the same one there: its id stays in its folder. Steps that
    it had reported before are not taken twice.
    """

    def __init__(self, folder: Path, training: JsonDict, name: str) -> None:
        try:
            import wandb
        except ImportError:
            raise LlavaError("--report-to wandb", got="no wandb", do="pip install wandb") from None
        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not has_key():
            mode = "offline"
        options: Any = {"mode": mode, "reinit": "create_new"}  # runs that train together have one each
        self.table: Any = wandb.Table
        path = folder / "wandb_run_id"
        known = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        known = known or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)  # which `wandb agent` gives
        replace_text(path, known + "\n")  # before there is a run: a kill may come at any time
        try:
            self.run: Any = wandb.init(
                project="llava-align",
                name=name,
                dir=folder,
                config=training,
                id=known,
                resume="allow",
                allow_val_change=True,
                **options,
            )
        except wandb.errors.Error as error:
            do = f"set WANDB_MODE=offline, leave out --report-to wandb, or delete {path} for a new run"
            raise LlavaError("Weights & Biases cannot begin a run", got=first_line(error), do=do) from None

    def log(self, step: int, metrics: JsonDict) -> None:
        self.run.log({name: self._value(value) for name, value in metrics.items()}, step=step)

    def _value(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        columns = list(value[0])
        return self.table(columns=columns, data=[[row[column] for column in columns] for row in value])

    def close(self) -> None:
        self.run.finish()


class MetricWriters:
    """Sends metrics to every writer asked for, once opened; the ranks that write nothing never open it."""

    def __init__(self, out: Path, report_to: Sequence[str], training: JsonDict, name: str) -> None:
        self.out, self.report_to, self.training, self.name = out, report_to, training, name
        self.writers: list[MetricWriter] = []

    def open(self, resume_step: int) -> None:
        """Open the writers, to go on after `resume_step`. Raises LlavaError if one is missing or fails."""
        self.writers.append(JsonLines(self.out / "metrics.jsonl", resume_step))
        if "tensorboard" in self.report_to:
            self.writers.append(TensorBoard(self.out / "tensorboard", resume_step))
        if "wandb" in self.report_to:
            self.writers.append(WeightsAndBiases(self.out, self.training, self.name))

    def log(self, step: int, metrics: JsonDict) -> None:
        for writer in self.writers:
            writer.log(step, metrics)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def has_key() -> bool:
    """Whether Weights & Biases would log in without a prompt: by the environment, or after `wandb login`."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        stored = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        stored = None
    return bool(os.environ.get("WANDB_API_KEY") or stored)


def logged(path: Path) -> list[JsonDict]:
    """The lines of a metrics.jsonl that can be read; says how many cannot. None if there is no such file."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line]
    whole = [line for line in lines if _step(line) < math.inf]
    if torn := len(lines) - len(whole):
        say(f"{path}: {counted(torn, 'damaged line')} left out")
    return [json.loads(line) for line in whole]


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line torn by a crash
