"""Checksums of a shard file, in its HDF5 user block: the first bytes, which HDF5 itself skips.

They are verified before HDF5 opens the file: it has no checksums of its own here, and may loop for ever in
damaged structures.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from llava_core.errors import LlavaError

USER_BLOCK_BYTES = 4096
MAGIC = b"LLVASHD2"
NUMBER = np.dtype("<u8")
SHARED, COLUMNS, SIZE, RANGES = 1, 2, 3, 4
"""Indices of the numbers, 8 bytes each, in the user block; MAGIC is number 0.

SHARED: xxh3 of what all rows share: texts, attributes, HDF5's structures. COLUMNS: xxh3 of the per-row
columns, 0 until they are written. SIZE: bytes of the file. RANGES: number of byte ranges that SHARED leaves
out, then the start and end of each."""
HDF5 = b"\x89HDF\r\n\x1a\n"
"""First bytes of a file without a user block, such as a shard of format version 1."""
READ_BYTES = 1 << 22
"""Bytes of one read."""
REDO = "delete it and run extract again"


def write_checksums(file: io.RawIOBase, ranges: Sequence[int]) -> None:
    """Fill the user block of a new file; `ranges` are starts and ends of the row data, ascending."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    file.write(MAGIC + np.array([0, 0, size, len(ranges) // 2, *ranges], NUMBER).tobytes())
    checksum = shared_checksum(file)
    file.seek(SHARED * NUMBER.itemsize)
    file.write(checksum.to_bytes(NUMBER.itemsize, "little"))


def shared_checksum(file: BinaryIO | io.RawIOBase) -> int:
    """xxh3 of the bytes from SIZE on, outside the recorded ranges: texts, attributes, HDF5's structures."""
    file.seek(0)
    head = np.frombuffer(file.read(USER_BLOCK_BYTES) or b"", NUMBER).tolist()
    size, at, digest = file.seek(0, os.SEEK_END), SIZE * NUMBER.itemsize, xxhash.xxh3_64()
    ranges = [*head[RANGES + 1 :][: 2 * head[RANGES]], size, size]
    for start, end in zip(ranges[::2], ranges[1::2], strict=False):
        file.seek(at)
        while at < start and (block := file.read(min(READ_BYTES, start - at))):
            digest.update(block)
            at += len(block)
        at = max(at, end)
    return digest.intdigest()


def require_checksum(path: Path, file: BinaryIO) -> None:
    """Raise LlavaError if the shared bytes have changed since they were written.

    Format version 1 has no checksum of them: such files pass.
    """
    head = file.read(USER_BLOCK_BYTES)
    if head.startswith(HDF5):
        return
    if len(head) < USER_BLOCK_BYTES or not head.startswith(MAGIC):
        raise LlavaError(f"{path} is not a readable HDF5 file", do=REDO)
    numbers = np.frombuffer(head, NUMBER).tolist()
    if (size := file.seek(0, os.SEEK_END)) < numbers[SIZE]:
        expected = f"{numbers[SIZE]:,} bytes"
        raise LlavaError(f"truncated shard {path}", expected=expected, got=f"{size:,}", do=REDO)
    if shared_checksum(file) != numbers[SHARED]:
        raise LlavaError(f"damaged shard {path}", got="other texts, attributes or structures", do=REDO)
