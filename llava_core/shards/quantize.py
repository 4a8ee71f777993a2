"""Storage of features in a shard: fp16, or int8 quantised with a scale per row and channel.

A row is final once written, and channels are unknown before the first image, so every row has its own scales:
the channel's largest magnitude in that row, divided by 127. Readers get fp16.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import xxhash

Storage = Literal["float16", "int8"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
FEATURE_TYPE = np.dtype("<f2")
LEVELS = 127
MAX_SCALE = 515.5
"""Largest scale: 127 times it is still finite in fp16."""
SERIAL = 32_767
"""Most elements that torch converts in the calling thread, without waking its thread pool."""


DatasetSpecs = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
"""Number type of each dataset, and the shape of one row in it."""


def dataset_specs(storage: Storage, tokens: int, width: int) -> DatasetSpecs:
    """The datasets that hold the features, by name."""
    if storage == "float16":
        return {"features": (FEATURE_TYPE, (tokens, width))}
    return {"features": (np.dtype("|i1"), (tokens, width)), "scales": (FEATURE_TYPE, (width,))}


def row_bytes(storage: Storage, tokens: int, width: int) -> int:
    """Bytes that the features of a row take on disk."""
    specs = dataset_specs(storage, tokens, width).values()
    return sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in specs)


def pack(storage: Storage, features: np.ndarray) -> list[np.ndarray]:
    """Features fp16 [T, D] -> one array for each dataset of `dataset_specs`."""
    features = np.require(features, FEATURE_TYPE, ["C", "W"])  # torch warns of read-only arrays
    return [features] if storage == "float16" else list(quantise(features))


def checksum(parts: Sequence[np.ndarray], kind: str = "xxh3", seed: int = 0) -> int:
    """Checksum, xxh3 (64 bits) or crc32, over the bytes of contiguous arrays, one after the other."""
    if kind == "crc32":
        crc = 0
        for part in parts:
            crc = zlib.crc32(part.data, crc)
        return crc
    digest = xxhash.xxh3_64(seed=seed)  # ten times as fast as zlib's crc32
    for part in parts:
        digest.update(part.data)
    return digest.intdigest()


def quantise(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finite fp16 [T, D] -> int8 [T, D] and fp16 scales [D].

    |features - int8 * scales| <= scales / 2 everywhere. Quantising the output of `dequantise` gives the same
    numbers again, unless a scale is subnormal.
    """
    values = np.empty(features.shape, np.float32)
    _convert(features, values)
    largest = np.abs(values).max(0)
    scales = np.minimum(largest / LEVELS, MAX_SCALE).astype(FEATURE_TYPE)
    reached = (scales.astype(np.float32) * LEVELS).astype(FEATURE_TYPE)
    scales = np.where(reached < largest, np.nextafter(scales, FEATURE_TYPE.type(np.inf)), scales)
    scales = np.minimum(scales, FEATURE_TYPE.type(MAX_SCALE))
    values /= np.where(scales > 0, scales, 1).astype(np.float32)
    return np.rint(values, out=values).astype(np.int8), scales


def dequantise(quantised: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """Products of int8 [T, D] and fp16 scales [D], rounded once, into `out`, fp16 [T, D]."""
    _convert(quantised * scales.astype(np.float32), out)


def _convert(source: np.ndarray, target: np.ndarray) -> None:
    """Copy to another number type, by torch: 10 times as fast as numpy, which converts fp16 singly."""
    import torch  # here, so that `extract inspect` starts without it

    numbers, converted = torch.from_numpy(source).view(-1), torch.from_numpy(target).view(-1)
    for start in range(0, len(numbers), SERIAL):
        converted[start : start + SERIAL] = numbers[start : start + SERIAL]
