"""The files that `benchmarks.mutations` damages: how each is written, and read back by value."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from extract.config import InspectConfig, VerifyConfig
from extract.inspect.command import run as inspect
from extract.verify import run as verify
from llava_align.config import MODELS
from llava_align.hub.config import ExportConfig
from llava_align.hub.export import run as export
from llava_align.hub.push import files_to_push
from llava_core.errors import LlavaError
from llava_core.language.load import load_language_model
from llava_core.projector.checkpoint import Provenance, load_checkpoint, load_state, save_checkpoint
from llava_core.projector.projector import build_projector
from llava_core.row_status import Status
from llava_core.shards.byte_offsets import COLUMNS
from llava_core.shards.hdf5_file import ShardHeader
from llava_core.shards.quantize import Storage
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord, ShardWriter
from llava_core.vision.open import open_vision_tower

ROWS, TOKENS, WIDTH = 24, 5, 12
DEAD = 3
"""The row that has no image."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A kind of folder that is written, and its reader."""

    name: str
    share: float
    """Share of all mutants."""
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    """Returns the content by value. Raises LlavaError or OSError if it refuses."""
    own: bool = True
    """Whether only this project reads it; otherwise any exception of a library counts as refused."""


def records() -> list[RowRecord]:
    rng = np.random.default_rng(0)
    return [
        RowRecord(row, Status.HTTP_4XX, http=404)
        if row == DEAD
        else RowRecord(
            row,
            Status.OK,
            rng.normal(size=(TOKENS, WIDTH)).astype("<f2"),
            http=200,
            attempts=1,
            nbytes=1000 + row,
            orig_hw=(30, 40 + row),
            sha256=hashlib.sha256(bytes([row])).digest(),
            thumbnail=rng.bytes(200 + row) + b"\xff\xd9",
        )
        for row in range(ROWS)
    ]


def header(storage: Storage) -> ShardHeader:
    captions = [f"左上角有一个红色的圆形，第 {row} 张。" for row in range(ROWS)]
    return ShardHeader(
        encoder={"model_id": "random", "weights_sha256": "0" * 64, "tokens": TOKENS, "width": WIDTH},
        preprocess={"size": 32, "filter": "bicubic", "decode": "draft", "mean": [0.5] * 3},
        source={"name": "x.parquet", "rows": ROWS, "sha256": "1" * 64},
        tokens=TOKENS,
        width=WIDTH,
        captions=captions,
        urls=[f"http://example.org/{row}.jpg" for row in range(ROWS)],
        ids=[f"id{row}" for row in range(ROWS)],
        storage=storage,
        thumbnails=True,
    )


def write_shard(folder: Path, storage: Storage, rows: int = ROWS) -> None:
    """Write a shard; with fewer than ROWS rows it stays unfinished."""
    folder.mkdir()
    with ShardWriter(folder / "x.h5", header(storage)) as writer:
        for start in range(0, rows, 6):
            writer.write(records()[start : start + 6])
        if rows == ROWS:
            writer.finish()


def read_shard(folder: Path) -> object:
    shard = Shard(folder / "x.h5")
    layout = shard.layout
    columns = [getattr(shard, name).tolist() for name in COLUMNS if name != layout.checksum]
    about = (
        shard.encoder,
        shard.preprocess,
        shard.source,
        shard.identity.fingerprint,
        layout.storage,
        layout.text,
    )
    rows = [
        (shard.turns(row), shard.url(row), shard.id(row), shard.thumbnail(row)) for row in range(shard.rows)
    ]
    return about, columns, rows, [shard.read(row).tobytes() for row in shard.ok_rows()]


def read_shard_and_inspect(folder: Path) -> object:
    """As `read_shard`, and check that `extract verify` finds damage exactly if that refuses."""
    try:
        read = read_shard(folder)
    except LlavaError:
        with contextlib.suppress(LlavaError):
            inspect(InspectConfig(out=folder, html=folder / "page.html"))
        with contextlib.suppress(LlavaError):
            if not verify(VerifyConfig(out=folder)).get("exit_code"):
                return "verify finds nothing"
        raise
    if verify(VerifyConfig(out=folder)).get("exit_code"):
        return "verify finds damage in what was read right"
    return read


def go_on(folder: Path) -> object:
    """Resume and finish a half-written shard."""
    with ShardWriter(folder / "x.h5", header("float16")) as writer:
        writer.write([record for record in records() if not writer.done[record.row]])
        writer.finish()
    return read_shard(folder)


def write_checkpoint(folder: Path, llm: Any, tower: Any) -> None:
    torch.manual_seed(0)
    projector = build_projector("mlp", tower.width, llm.hidden)
    provenance = Provenance(tower.identity, llm.identity)
    state = {"step": 7, "best": 1.5, "momenta": torch.randn(200), "rows": {"train": "a" * 64}}
    training = {"lr": 0.002, "features": "features/train", "epochs": 3}
    save_checkpoint(folder, projector, provenance, training, {"step": 7, "eval_loss": 1.5}, state)


def read_checkpoint(folder: Path) -> object:
    loaded, state = load_checkpoint(folder), load_state(folder)
    weights = {name: tensor.numpy().tobytes() for name, tensor in loaded.projector.state_dict().items()}
    state = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    return loaded.projector.config, loaded.provenance, loaded.training, loaded.metrics, weights, state


def read_export(folder: Path) -> object:
    """Load by transformers, and check that `llava push` refuses what it refuses."""
    try:
        opened = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    except Exception:
        with contextlib.suppress(LlavaError):
            files_to_push(folder, with_state=False)
            return "push finds nothing"
        raise
    files_to_push(folder, with_state=False)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    weights = {k: v.float().numpy().tobytes() for k, v in opened.state_dict().items()}
    return (
        weights,
        processor.tokenizer("红色的圆形 <|im_end|>")["input_ids"],
        opened.generation_config.to_dict(),
    )


def artifacts(models: Path, exports: bool = True) -> list[Artifact]:
    """All kinds; the checkpoint that is exported goes to the folder `models`."""
    tower, llm = open_vision_tower(MODELS / "vision"), load_language_model(MODELS / "llm")
    write_checkpoint(models / "checkpoint", llm, tower)

    def write_export(folder: Path) -> None:
        vision, llm = MODELS / "vision", MODELS / "llm"
        export(ExportConfig(checkpoint=models / "checkpoint", vision=vision, llm=llm, out=folder))

    made = [
        Artifact("shard, float16", 0.25, lambda f: write_shard(f, "float16"), read_shard_and_inspect),
        Artifact("shard, int8", 0.15, lambda f: write_shard(f, "int8"), read_shard_and_inspect),
        Artifact("half-written shard and journal", 0.3, lambda f: write_shard(f, "float16", 18), go_on),
        Artifact("checkpoint", 0.2, lambda f: write_checkpoint(f, llm, tower), read_checkpoint),
    ]
    if exports:
        made.append(Artifact("export", 0.1, write_export, read_export, own=False))
    return made
