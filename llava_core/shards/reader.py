"""The feature shard on disk: one HDF5 file per source of rows, row i of one is row i of the other.

This is the only module that knows HDF5. It creates a file whole, and it opens a finished one strictly; what
happens in between goes through plain system calls at the offsets it reports (llava_core.shards.writer). The
format is described in features/README.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from llava_core import __version__
from llava_core.errors import LlavaError, first_line
from llava_core.identity import EncoderIdentity
from llava_core.row_status import Failure, Status
from llava_core.shards import user_block
from llava_core.shards.dialogue import Turns, turns_from_text
from llava_core.shards.layout import (
    CHECKSUMS,
    COLUMNS,
    FORMAT_VERSION,
    SLOT_BYTES,
    Layout,
    columns,
    disk_bytes,
)
from llava_core.shards.quantize import FEATURE_TYPE, STORAGES, Storage, checksum, parts_of
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


class Shard:
    """A finished shard, opened strictly; HDF5 is closed again once this exists.

    Columns are arrays of all rows: `status`, `checksums`, `http`, `attempts`, `nbytes`, `orig_hw`, `sha256`.
    A row's features are compared with their checksum when a process first reads them.
    """

    status: np.ndarray
    checksums: np.ndarray
    http: np.ndarray
    attempts: np.ndarray
    nbytes: np.ndarray
    orig_hw: np.ndarray
    sha256: np.ndarray

    def __init__(self, path: Path) -> None:
        self.path = path
        layout = read_layout(path)
        self.layout = layout
        self.rows, self.tokens, self.width = layout.rows, layout.tokens, layout.width
        self.encoder, self.preprocess, self.source = layout.encoder, layout.preprocess, layout.source
        self.identity = layout.identity
        self.conversations, self.local = layout.text == "conversation", layout.images == "local"
        self._open: tuple[int, int] | None = None
        self._checked = np.zeros(self.rows, bool)
        held = {name: self._array(name, kind) for name, (kind, _) in columns(layout.version).items()}
        mtime = layout.mtime(self._descriptor())
        head = os.pread(self._descriptor(), user_block.BYTES, 0)
        recorded = np.frombuffer(head, user_block.NUMBER)[user_block.COLUMNS]
        if layout.version > 1 and checksum([*held.values(), *mtime]) != recorded:
            raise LlavaError(f"damaged shard {path}", got="other outcomes of its rows", do=AGAIN)
        for name, (_, shape) in columns(layout.version).items():
            column = held[name].reshape(self.rows, *shape)
            setattr(self, "checksums" if name == layout.checksum else name, column)
        self.mtime = mtime[0] if mtime else np.zeros(self.rows, "<i8")
        """When each row's image file was last modified, in ns since 1970; 0 for what came from no file."""
        self._ends = {name: self._array(f"{name}_offsets", "<i8") for name in TEXTS}
        for name, ends in self._ends.items():
            if ends[0] != 0 or (np.diff(ends) < 0).any() or ends[-1] != layout.sizes[f"{name}_bytes"]:
                raise LlavaError(f"damaged shard {path}", got=f"{name}_offsets out of order", do=AGAIN)
        if unknown := set(self.status.tolist()) - set(Status):
            raise LlavaError(f"damaged shard {path}", got=f"status {min(unknown)}", do=AGAIN)
        self._close()  # a folder may hold more shards than a process may have open files

    def read_into(self, row: int, out: np.ndarray) -> None:
        """Features of `row` into `out`, a C-contiguous fp16 array [T, D]. Raises LlavaError if damaged."""
        recorded = None if self._checked[row] else int(self.checksums[row])
        self.layout.read_into(self._descriptor(), row, out, recorded)
        self._checked[row] = True

    def read(self, row: int) -> np.ndarray:
        """Features of `row`: fp16 [T, D]. Raises LlavaError if they are damaged."""
        out = np.empty((self.tokens, self.width), FEATURE_TYPE)
        self.read_into(row, out)
        return out

    def ok_rows(self) -> list[int]:
        """The rows that have features, in their order."""
        rows: list[int] = np.flatnonzero(self.status == Status.OK).tolist()
        return rows

    def failed(self, failures: Iterable[Failure]) -> np.ndarray:
        """Which rows ended in one of these ways, bool [N]; for `damaged`, reads every row."""
        mask = np.zeros(self.rows, bool)
        for failure in failures:
            mask |= failure.mask(self.status, self.http)
            if failure.status is Status.DAMAGED:
                mask[[row for row in self.ok_rows() if not self.check(row)]] = True
        return mask

    def check(self, row: int) -> bool:
        """Whether features and thumbnail of `row`, which is ok, still have their checksums."""
        return self.layout.is_whole(self._descriptor(), row, int(self.checksums[row]))

    def checksum(self, row: int) -> int:
        """Of the features of `row` as they lie on disk now."""
        return self.layout.row_checksum(self._descriptor(), row)

    def thumbnail(self, row: int) -> bytes | None:
        """A small JPEG of `row`; None if the shard keeps none or the row is not ok.

        Raises LlavaError if it is damaged.
        """
        if self.status[row] != Status.OK:
            return None
        return self.layout.read_thumbnail(self._descriptor(), row)

    def caption(self, row: int) -> str:
        return self._text("caption", row)

    def caption_bytes(self, row: int) -> int:
        """Length of its caption, or dialogue, as stored; reads nothing."""
        ends = self._ends["caption"]
        return int(ends[row + 1] - ends[row])

    def turns(self, row: int) -> Turns:
        """Questions and answers; a caption is the answer to a question that is still to be drawn, None."""
        text = self.caption(row)
        if not self.conversations or not text:
            return ((None, text),) if text.strip() else ()
        try:
            return turns_from_text(text)
        except ValueError:
            raise LlavaError(f"damaged shard {self.path}", got=f"dialogue of row {row}", do=AGAIN) from None

    def url(self, row: int) -> str:
        return self._text("url", row)

    def picture_keys(self, row: int) -> list[bytes | str]:
        """What tells its picture from others (llava_core.pairing): sha256 and address, where they are known.

        Of a local image the sha256 alone: one name may be that of several, in several folders.
        """
        digest, url = self.sha256[row].tobytes(), "" if self.local else self.url(row)
        return [*([digest] if any(digest) else ()), *([url] if url else ())]

    def id(self, row: int) -> str:
        return self._text("id", row)

    def urls(self) -> list[str]:
        """All of them, in one read."""
        data, ends = self._array("url_bytes", "|u1").tobytes(), self._ends["url"].tolist()
        return [data[a:b].decode("utf-8", "replace") for a, b in itertools.pairwise(ends)]

    def _text(self, name: str, row: int) -> str:
        start, end = map(int, self._ends[name][row : row + 2])
        data = os.pread(self._descriptor(), end - start, self.layout.offsets[f"{name}_bytes"] + start)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise LlavaError(f"damaged shard {self.path}", got=f"{name} of row {row}", do=AGAIN) from None

    def _array(self, name: str, kind: str) -> np.ndarray:
        data = os.pread(self._descriptor(), self.layout.sizes[name], self.layout.offsets[name])
        return np.frombuffer(data, kind)

    def _descriptor(self) -> int:
        """A file descriptor of this process's own: one inherited through fork would be shared."""
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        return self._open[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None, "_checked": np.zeros(self.rows, bool)}

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        opened = getattr(self, "_open", None)
        if opened is not None and opened[0] == os.getpid():
            os.close(opened[1])
        self._open = None


@contextlib.contextmanager
def read_by_hdf5(shard: Shard) -> Iterator[Callable[[int], np.ndarray]]:
    """Reads the features of a row, fp16 [T, D], as any program with h5py does: to compare with."""
    with h5py.File(shard.path, "r", locking=False) as file:
        features, scales = file["features"], file.get("scales")
        yield (lambda row: features[row]) if scales is None else (lambda row: features[row] * scales[row])
