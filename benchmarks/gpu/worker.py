"""Runs sections one after another and writes their rows, a line of JSON each, to standard output.

Arguments: shape, a folder for models and features, and SECTION=SECONDS for each.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pkgutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.rows import Clock, Row

PACKAGES = ("llava_core", "extract", "train", "infer", "llava_align")
SMALL_S = 1.0
"""What a section measures for with the small shape, whatever its deadline."""
OPTIONAL = ("optuna", "matplotlib", "ray", "jieba", "gguf", "wandb", "modelscope", "tensorboard")
"""Of extras; what needs them is not measured."""
SHIPPED = ("llava_align.hub.modeling_llava_align", "llava_align.hub.processing_llava_align")
"""Run from exported folders alone."""


def main() -> None:
    shape, memory, budgets = sys.argv[1], Path(sys.argv[2]), [word.split("=") for word in sys.argv[3:]]
    rows = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the product prints goes to the log
    write(rows, {"event": "begin", "section": "imports"})
    missing = import_everything()
    for name in missing:
        needed = name not in OPTIONAL
        write(rows, {"name": "cannot be imported", "value": name, "unit": "failed" if needed else ""})
    if any(name not in OPTIONAL for name in missing):
        sys.exit(3)

    from benchmarks.gpu import answers, machine, pictures, training, training_step
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.rows import Clock

    sections: dict[str, Callable[[Bench, Clock], Iterator[Row]]] = {
        "ceilings": machine.ceilings,
        "audit": training.audit,
        "step": training_step.step,
        "stage2": training_step.stage2,
        "breakdown": training_step.breakdown,
        "end-to-end": training.end_to_end,
        "decode": answers.decode,
        "sweep": training.sweep,
        "encode": pictures.encode,
        "serve": answers.serve,
        "tokens": training_step.tokens,
        "memory": training.memory,
    }
    for each in machine.versions():
        write(rows, dataclasses.asdict(each))
    write(rows, {"event": "end", "section": "imports"})
    bench = Bench(shape, Path(tempfile.mkdtemp(dir=memory)))
    for name, seconds in budgets[1:]:
        write(rows, {"event": "begin", "section": name})
        clock = Clock(SMALL_S if shape == "small" else float(seconds))
        try:
            for each in bench.setup() if name == "setup" else sections[name](bench, clock):
                write(rows, dataclasses.asdict(each if shape == "reference" else no_prediction(each)))
        except Exception as error:  # a row, and the next section
            traceback.print_exc()
            text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            write(rows, {"name": "failed", "value": text, "unit": "failed"})
            bench.forget()
        write(rows, {"event": "end", "section": name})


def import_everything() -> list[str]:
    """Import every module of the product; returns what is not there, each once."""
    missing: dict[str, None] = {}
    for package in PACKAGES:
        for found in pkgutil.walk_packages([package], f"{package}."):
            if found.name.endswith("__main__") or found.name in SHIPPED:
                continue
            try:
                importlib.import_module(found.name)
            except ImportError as error:
                missing.setdefault((error.name or str(error)).split(".")[0])
    return list(missing)


def no_prediction(row: Row) -> Row:
    """Predictions are of the reference's shape."""
    return dataclasses.replace(row, predicted="")


def write(rows: IO[str], event: dict[str, object]) -> None:
    rows.write(json.dumps(event, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
