"""The shard file as HDF5: created whole, opened strictly. The only module that knows HDF5.

What happens in between goes through plain system calls at the offsets it reports (`writer.py`, `layout.py`).
The format is described in features/README.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
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
from llava_core.shards import user_block
from llava_core.shards.layout import (
    CHECKSUMS,
    COLUMNS,
    FORMAT_VERSION,
    SLOT_BYTES,
    Layout,
    columns,
    disk_bytes,
)
from llava_core.shards.quantize import STORAGES, Storage, parts_of
from llava_core.shards.sparse_file import SparseFile
from llava_core.shards.user_block import AGAIN, require_common, write_user_block
from llava_core.types import JsonDict

FORMAT = "llava-features"


ALIGNMENT = 4096


TEXTS = ("caption", "url", "id")


@dataclasses.dataclass(frozen=True)
class ShardHeader:
    """What a shard is made of, known before the first image arrives."""

    encoder: JsonDict
    preprocess: JsonDict
    source: JsonDict
    """name, rows and sha256 of what it is made from."""
    tokens: int
    width: int
    captions: Sequence[str]
    urls: Sequence[str]
    ids: Sequence[str]
    storage: Storage = "float16"
    """How features lie in the file; who reads them gets fp16 either way."""
    thumbnails: bool = False
    """Whether there is space for a small JPEG of each row."""
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
        """Of the file when it is full, its text and columns aside."""
        return self.rows * disk_bytes(self.storage, self.tokens, self.width, self.thumbnails)


def create_file(path: Path, header: ShardHeader) -> None:
    """Write a whole shard file with its text; the space of the features is reserved and left sparse.

    Raises OSError if it cannot be written, or what is read back is not what was written.
    """
    content = SparseFile()
    room = {"alignment_threshold": 1, "alignment_interval": ALIGNMENT, "userblock_size": user_block.BYTES}
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
        for name, (dtype, shape) in parts_of(header.storage, header.tokens, header.width).items():
            _create(file, name, (header.rows, *shape), dtype)
        if header.local:
            _create(file, "mtime", (header.rows,), np.dtype("<i8"))
        if header.thumbnails:
            _create(file, "thumbnails", (header.rows, SLOT_BYTES), np.dtype("|u1"))
    with h5py.File(content, "r") as file:
        layout = _layout(path, file, content.seek(0, os.SEEK_END))
    write_user_block(content, layout.ranges)
    content.save(path)


def _create(file: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A contiguous dataset whose space is allocated now and never filled."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape)
    kind = h5py.h5t.py_create(dtype)
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, plist))


def read_layout(path: Path) -> Layout:
    """Open a shard file strictly and say where everything lies.

    Raises LlavaError, naming what is wrong, for anything that is not a whole shard of this format version.
    """
    with path.open("rb") as plain:  # what keeps a whole file from being read says so itself
        require_common(path, plain)
        try:
            file = h5py.File(path, "r", locking=False)
        except OSError as error:
            reason = str(error).split("(")[-1].rstrip(")")
            raise LlavaError(f"{path} is not a readable HDF5 file", got=reason, do=AGAIN) from None
        with file:
            try:
                layout = _layout(path, file, os.path.getsize(path))
            except LlavaError:
                raise
            except Exception as error:  # h5py and json raise whatever a flipped bit makes them trip over
                raise LlavaError(f"damaged shard {path}", got=first_line(error), do=AGAIN) from None
    return layout


def _layout(path: Path, file: Any, end: int) -> Layout:
    """`end`: bytes of the file."""
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
        raise LlavaError(f"{path} carries a fingerprint that is not that of its attributes", do=AGAIN)
    storage = attributes.get("storage", "float16")
    if storage not in STORAGES:
        raise LlavaError(
            f"{path} stores features in another way", expected=" or ".join(STORAGES), got=storage
        )
    rows, tokens, width = file["features"].shape
    wanted = {name: (np.dtype(kind), (rows, *shape)) for name, (kind, shape) in columns(version).items()}
    for name, (dtype, shape) in parts_of(storage, tokens, width).items():
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
        dataset = file[name]
        if dataset.dtype != dtype or dataset.shape != shape:
            raise LlavaError(
                f"{path}: dataset {name}",
                expected=f"{dtype} {shape}",
                got=f"{dataset.dtype} {dataset.shape}",
                do=AGAIN,
            )
        offsets[name], sizes[name] = dataset.id.get_offset() or 0, dataset.size * dtype.itemsize
        if sizes[name] and not offsets[name]:
            raise LlavaError(f"{path}: dataset {name} is not contiguous", do=AGAIN)
        if offsets[name] + sizes[name] > end:
            raise LlavaError(
                f"truncated shard {path}",
                expected=f"{offsets[name] + sizes[name]:,} bytes",
                got=f"{end:,}",
                do=AGAIN,
            )
    if version > 1 and not file.userblock_size:
        raise LlavaError(f"damaged shard {path}", got="no checksums in it", do=AGAIN)
    source, uid = json.loads(attributes["source"]), attributes["uid"]
    text, images = attributes.get("text", "caption"), attributes.get("images", "address")
    if text not in ("caption", "conversation") or images not in ("address", "local"):
        raise LlavaError(f"damaged shard {path}", got=f"text {text}, images {images}", do=AGAIN)
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
    """Reads the features of a row, fp16 [T, D], as any program with h5py does: to compare with."""
    with h5py.File(path, "r", locking=False) as file:
        features, scales = file["features"], file.get("scales")
        yield (lambda row: features[row]) if scales is None else (lambda row: features[row] * scales[row])
