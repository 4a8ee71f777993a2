"""The shard file format in HDF5: a file is created whole and opened strictly. The only module that uses h5py.

Rows are written and read by plain system calls at the offsets it reports (`writer.py`, `byte_offsets.py`).
The format is described in features/README.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from llava_core import __version__
from llava_core.errors import LlavaError, first_line
from llava_core.identity import EncoderIdentity
from llava_core.shards.byte_offsets import (
    CHECKSUMS,
    COLUMNS,
    FORMAT_VERSION,
    SLOT_BYTES,
    Layout,
    columns,
    disk_bytes,
)
from llava_core.shards.file_checksums import REDO, USER_BLOCK_BYTES, require_checksum, write_checksums
from llava_core.shards.quantize import STORAGES, Storage, dataset_specs
from llava_core.shards.sparse_file import SparseFile
from llava_core.types import JsonDict

FORMAT = "llava-features"
ALIGNMENT = 4096
TEXTS = ("caption", "url", "id")


@dataclasses.dataclass(frozen=True)
class ShardHeader:
    """A shard's texts and metadata, known before the first image arrives."""

    encoder: JsonDict
    preprocess: JsonDict
    source: JsonDict
    """name, rows and sha256 of the source file."""
    tokens: int
    width: int
    captions: Sequence[str]
    urls: Sequence[str]
    ids: Sequence[str]
    storage: Storage = "float16"
    """Number type of features in the file; readers get fp16 either way."""
    thumbnails: bool = False
    """Whether to reserve space for a small JPEG of each row."""
    conversations: bool = False
    """The captions are dialogues (llava_core.shards.dialogue)."""
    local: bool = False
    """Some images are in files or in the source itself."""

    @property
    def rows(self) -> int:
        return len(self.captions)

    @property
    def identity(self) -> EncoderIdentity:
        return EncoderIdentity(self.encoder, self.preprocess)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the full file, without its texts and columns."""
        return self.rows * disk_bytes(self.storage, self.tokens, self.width, self.thumbnails)


def create_file(path: Path, header: ShardHeader) -> None:
    """Write a shard file with its texts; space for features is reserved, and stays sparse until written.

    Raises OSError if the file cannot be written, or reads back with other bytes.
    """
    content = SparseFile()
    room = {"alignment_threshold": 1, "alignment_interval": ALIGNMENT, "userblock_size": USER_BLOCK_BYTES}
    with h5py.File(content, "w", **room) as file:
        file.attrs.update(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            tool_version=__version__,
            encoder=json.dumps(header.encoder, sort_keys=True),
            preprocess=json.dumps(header.preprocess, sort_keys=True),
            fingerprint=header.identity.fingerprint,
            source=json.dumps(header.source, sort_keys=True),
            uid=uuid.uuid4().hex,
            storage=header.storage,
            text="conversation" if header.conversations else "caption",
            images="local" if header.local else "address",
        )
        for name, texts in zip(TEXTS, (header.captions, header.urls, header.ids), strict=True):
            encoded = [text.encode("utf-8", "replace") for text in texts]
            offsets = np.cumsum([0, *map(len, encoded)], dtype="<i8")
            _create(file, f"{name}_bytes", (int(offsets[-1]),), np.dtype("|u1"))
            _create(file, f"{name}_offsets", offsets.shape, offsets.dtype)[:] = offsets
            if offsets[-1]:
                file[f"{name}_bytes"][:] = np.frombuffer(b"".join(encoded), np.uint8)
        for name, (kind, shape) in COLUMNS.items():
            _create(file, name, (header.rows, *shape), np.dtype(kind))
        for name, (dtype, shape) in dataset_specs(header.storage, header.tokens, header.width).items():
            _create(file, name, (header.rows, *shape), dtype)
        if header.local:
            _create(file, "mtime", (header.rows,), np.dtype("<i8"))
        if header.thumbnails:
            _create(file, "thumbnails", (header.rows, SLOT_BYTES), np.dtype("|u1"))
    with h5py.File(content, "r") as file:
        layout = _layout(path, file, content.seek(0, os.SEEK_END))
    write_checksums(content, layout.ranges)
    content.save(path)


def _create(file: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A contiguous dataset whose space is allocated at once and not filled."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape)
    kind = h5py.h5t.py_create(dtype)
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, plist))


def read_layout(path: Path) -> Layout:
    """Metadata of a shard file and the byte offset of each dataset.

    Raises LlavaError, naming what is wrong, for anything but a complete shard of a known format version.
    """
    with path.open("rb") as plain:  # an OSError here, such as of permissions, already has a good message
        require_checksum(path, plain)
        try:
            file = h5py.File(path, "r", locking=False)
        except OSError as error:
            reason = str(error).split("(")[-1].rstrip(")")
            raise LlavaError(f"{path} is not a readable HDF5 file", got=reason, do=REDO) from None
        with file:
            try:
                layout = _layout(path, file, os.path.getsize(path))
            except LlavaError:
                raise
            except Exception as error:  # h5py and json raise whatever a flipped bit makes them trip over
                raise LlavaError(f"damaged shard {path}", got=first_line(error), do=REDO) from None
    return layout


def _layout(path: Path, file: Any, end: int) -> Layout:
    """See `read_layout`; `end` is the size of the file in bytes."""
    attributes = dict(file.attrs)
    kind = (attributes.get("format"), attributes.get("format_version"))
    if kind not in [(FORMAT, version) for version in CHECKSUMS]:
        raise LlavaError(
            f"{path} has another format",
            expected=f"{FORMAT} version {' or '.join(map(str, CHECKSUMS))}",
            got=f"{kind[0]} version {kind[1]}",
        )
    version = int(kind[1])
    encoder, preprocess = json.loads(attributes["encoder"]), json.loads(attributes["preprocess"])
    if EncoderIdentity(encoder, preprocess).fingerprint != attributes["fingerprint"]:
        raise LlavaError(f"{path} carries a fingerprint that is not that of its attributes", do=REDO)
    storage = attributes.get("storage", "float16")
    if storage not in STORAGES:
        raise LlavaError(f"{path} stores features in another way", expected=", ".join(STORAGES), got=storage)
    rows, tokens, width = file["features"].shape
    wanted = {name: (np.dtype(kind), (rows, *shape)) for name, (kind, shape) in columns(version).items()}
    for name, (dtype, shape) in dataset_specs(storage, tokens, width).items():
        wanted[name] = (dtype, (rows, *shape))
    if "mtime" in file:
        wanted["mtime"] = (np.dtype("<i8"), (rows,))
    if "thumbnails" in file:
        wanted["thumbnails"] = (np.dtype("|u1"), (rows, SLOT_BYTES))
    for name in TEXTS:
        wanted[f"{name}_offsets"] = (np.dtype("<i8"), (rows + 1,))
        wanted[f"{name}_bytes"] = (np.dtype("|u1"), file[f"{name}_bytes"].shape)
    offsets, sizes = {}, {}
    for name, (dtype, shape) in wanted.items():
        dataset = h5py.h5d.open(file.id, name.encode())  # what file[name] wraps, at a third of its time
        if dataset.dtype != dtype or dataset.shape != shape:
            raise LlavaError(
                f"{path}: dataset {name}",
                expected=f"{dtype} {shape}",
                got=f"{dataset.dtype} {dataset.shape}",
                do=REDO,
            )
        offsets[name], sizes[name] = dataset.get_offset() or 0, math.prod(shape) * dtype.itemsize
        if sizes[name] and not offsets[name]:
            raise LlavaError(f"{path}: dataset {name} is not contiguous", do=REDO)
        if offsets[name] + sizes[name] > end:
            raise LlavaError(
                f"truncated shard {path}",
                expected=f"{offsets[name] + sizes[name]:,} bytes",
                got=f"{end:,}",
                do=REDO,
            )
    if version > 1 and not file.userblock_size:
        raise LlavaError(f"damaged shard {path}", got="no checksums in it", do=REDO)
    source, uid = json.loads(attributes["source"]), attributes["uid"]
    text, images = attributes.get("text", "caption"), attributes.get("images", "address")
    if text not in ("caption", "conversation") or images not in ("address", "local"):
        raise LlavaError(f"damaged shard {path}", got=f"text {text}, images {images}", do=REDO)
    return Layout(
        path=path,
        version=version,
        rows=rows,
        tokens=tokens,
        width=width,
        offsets=offsets,
        sizes=sizes,
        encoder=encoder,
        preprocess=preprocess,
        source=source,
        uid=uid,
        storage=storage,
        text=text,
        images=images,
    )


@contextlib.contextmanager
def read_by_hdf5(path: Path) -> Iterator[Callable[[int], np.ndarray]]:
    """Yields a function from a row to its features, fp16 [T, D], read through h5py: for comparison."""
    with h5py.File(path, "r", locking=False) as file:
        features, scales = file["features"], file.get("scales")
        yield (lambda row: features[row]) if scales is None else (lambda row: features[row] * scales[row])
