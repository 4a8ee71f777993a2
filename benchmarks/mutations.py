"""Damage at random, to every file that we write: what is read of it then?

    python -m benchmarks.mutations --count 1000 --seed 0

A mutant has one file with a bit flipped, a range zeroed, its end cut off, two blocks swapped or bytes added.
A process of its own reads the whole shard, checkpoint or export, or goes on with the half-written shard, and
compares with what was written:

    refused    one line that says what is wrong
    repaired   the right values, and a line that says what was made again
    same       the right values: the damage hit nothing that is read
    wrong, traceback, hang   what must not be
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import transformers
import tyro

from extract.config import InspectConfig, VerifyConfig
from extract.inspect.command import run as inspect
from extract.verify import run as verify
from llava_align.config import MODELS, ExportConfig
from llava_align.hub.export import run as export
from llava_align.hub.push import files_to_push
from llava_core.cli.console import table
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

Outcome = Literal["refused", "repaired", "same", "wrong", "traceback", "hang"]
ROWS, TOKENS, WIDTH = 24, 5, 12
DEAD = 3
"""The row that has no image."""
LONGEST_S = 60
"""After which a reader counts as hung."""


@dataclasses.dataclass(frozen=True)
class Settings:
    count: int = 1000
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Artifact:
    """Something that we write, in a folder, and what its readers make of it."""

    name: str
    share: float
    """Of all mutants."""
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    """What it holds, by value. Raises LlavaError or OSError for what it refuses."""
    own: bool = True
    """Ours alone reads it; otherwise a library's errors, too, are a refusal."""


def mutate(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """How, and what became of it: never the same bytes."""
    while True:
        how = rng.choice(("bit", "zeros", "cut", "swap", "appended"))
        changed, at = bytearray(data), rng.randrange(len(data))
        length = min(rng.choice((1, 8, 64, 512, 4096)), len(data))
        if how == "bit":
            changed[at] ^= 1 << rng.randrange(8)
        elif how == "zeros":
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        elif how == "cut":
            del changed[at:]
        elif how == "appended":
            changed += rng.randbytes(length) if rng.random() < 0.5 else bytes(length)
        else:
            one, other = (rng.randrange(len(data) // length) * length for _ in range(2))
            first, second = changed[one : one + length], changed[other : other + length]
            changed[one : one + length], changed[other : other + length] = second, first
        if changed != data:
            return how, bytes(changed)


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
    """With all of its rows, or half written."""
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
    """With the commands: none may find nothing in what another refuses."""
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
    """Finish a shard that is half written."""
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
    """As transformers does, and as `llava push` does."""
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
    """`models`: a folder for what the export is made of."""
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


def outcome(artifact: Artifact, folder: Path, wanted: object) -> tuple[Outcome, str]:
    """What a process of its own makes of a mutant, and what it said."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_read, args=(artifact, folder, wanted, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(LONGEST_S):
            return "hang", f"after {LONGEST_S} s"
        found: tuple[Outcome, str] = ours.recv()
        return found
    except EOFError:
        process.join()
        return "traceback", f"signal {-(process.exitcode or 0)}"
    finally:
        process.kill()
        process.join()


def _read(artifact: Artifact, folder: Path, wanted: object, answer: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    said = io.StringIO()
    found: Outcome
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            same = artifact.read(folder) == wanted
            line = said.getvalue().strip()
            found = "wrong" if not same else "repaired" if "made again" in line else "same"
        except (LlavaError, OSError) as error:
            found, line = "refused", str(error)
        except Exception:
            found, line = "traceback" if artifact.own else "refused", traceback.format_exc()
    answer.send((found, line))


def mutants(
    made: Sequence[Artifact], count: int, seed: int, folder: Path
) -> list[tuple[Artifact, str, str, Outcome, str]]:
    """(artifact, file, how, outcome, what was said) of each."""
    rng, found = random.Random(seed), []
    shares = sum(artifact.share for artifact in made)
    for artifact in made:
        whole, mutant = folder / f"{artifact.name}/whole", folder / f"{artifact.name}/mutant"
        whole.parent.mkdir(parents=True)
        artifact.write(whole)
        shutil.copytree(whole, mutant)
        with contextlib.redirect_stdout(io.StringIO()):  # before any fork: it imports what reading takes
            wanted = artifact.read(mutant)
        for _ in range(round(count * artifact.share / shares)):
            shutil.rmtree(mutant)
            shutil.copytree(whole, mutant)
            files = sorted(path for path in mutant.iterdir() if path.stat().st_size)
            path = rng.choice([path for path in files if path.suffix != ".lock"])
            how, data = mutate(path.read_bytes(), rng)
            path.write_bytes(data)
            found.append((artifact, path.name, how, *outcome(artifact, mutant, wanted)))
    return found


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    with tempfile.TemporaryDirectory() as folder:
        found = mutants(artifacts(Path(folder) / "models"), settings.count, settings.seed, Path(folder))
    columns = get_args(Outcome)
    groups: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for artifact, _, how, result, _ in found:
        for group in (artifact.name, how, "all"):
            groups[group][result] += 1
    order = [*dict.fromkeys(a.name for a, *_ in found), *sorted({how for _, _, how, *_ in found}), "all"]
    rows = [(name, groups[name].total(), *(groups[name][c] for c in columns)) for name in order]
    print(table(rows, ("mutants of", "", *columns)))
    for artifact, name, how, result, said in found:
        if result in ("wrong", "traceback", "hang"):
            print(f"\n{result}: {artifact.name}, {name}, {how}\n{said}")
    os._exit(any(groups["all"][c] for c in ("wrong", "traceback", "hang")))


if __name__ == "__main__":
    main()
