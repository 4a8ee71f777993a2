"""The first bytes of a shard, which HDF5 passes over: checksums, read before HDF5 sees the file.

HDF5 has none of its own here, and in damaged structures it may loop for ever.
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

BYTES = 4096
MAGIC = b"LLVASHD2"
NUMBER = np.dtype("<u8")
COMMON, COLUMNS, SIZE, RANGES = 1, 2, 3, 4
"""Places of the numbers that follow MAGIC. COMMON: xxh3 of what all rows share. COLUMNS: xxh3 of the columns,
0 until they are written. SIZE: bytes of the file. RANGES: how many parts of it COMMON leaves out, then where
each starts and ends."""
HDF5 = b"\x89HDF\r\n\x1a\n"
"""What a file without a user block begins with, such as a shard of format version 1."""
BLOCK = 1 << 22
"""Bytes that are read at a time."""
AGAIN = "delete it and run extract again"


def write_user_block(file: io.RawIOBase, ranges: Sequence[int]) -> None:
    """`ranges`: starts and ends of what rows are written to later, ascending."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    file.write(MAGIC + np.array([0, 0, size, len(ranges) // 2, *ranges], NUMBER).tobytes())
    common = common_checksum(file)
    file.seek(COMMON * NUMBER.itemsize)
    file.write(common.to_bytes(NUMBER.itemsize, "little"))


def common_checksum(file: BinaryIO | io.RawIOBase) -> int:
    """Of a file from SIZE on, but for the ranges that it names: texts, attributes and HDF5's structures."""
    file.seek(0)
    head = np.frombuffer(file.read(BYTES) or b"", NUMBER).tolist()
    size, at, digest = file.seek(0, os.SEEK_END), SIZE * NUMBER.itemsize, xxhash.xxh3_64()
    ranges = [*head[RANGES + 1 :][: 2 * head[RANGES]], size, size]
    for start, end in zip(ranges[::2], ranges[1::2], strict=False):
        file.seek(at)
        while at < start and (block := file.read(min(BLOCK, start - at))):
            digest.update(block)
            at += len(block)
        at = max(at, end)
    return digest.intdigest()


def require_common(path: Path, file: BinaryIO) -> None:
    """Raise LlavaError unless what all rows share is as it was written; format version 1 does not tell."""
    head = file.read(BYTES)
    if head.startswith(HDF5):
        return
    if len(head) < BYTES or not head.startswith(MAGIC):
        raise LlavaError(f"{path} is not a readable HDF5 file", do=AGAIN)
    numbers = np.frombuffer(head, NUMBER).tolist()
    if (size := file.seek(0, os.SEEK_END)) < numbers[SIZE]:
        expected = f"{numbers[SIZE]:,} bytes"
        raise LlavaError(f"truncated shard {path}", expected=expected, got=f"{size:,}", do=AGAIN)
    if common_checksum(file) != numbers[COMMON]:
        raise LlavaError(f"damaged shard {path}", got="other texts, attributes or structures", do=AGAIN)
