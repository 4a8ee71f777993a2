"""How the features of a row lie in a shard: fp16 as they are, or int8 with a scale for each channel.

Nothing is known of a channel before the first image, and a row that is written is final, so every row has
scales of its own: the channel's largest magnitude in that row, divided by 127. Whoever reads gets fp16.
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
"""The largest scale of which 127 are still a finite fp16."""
SERIAL = 32_767
"""Most elements that torch computes without waking its pool."""


def parts_of(storage: Storage, tokens: int, width: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Datasets that hold the features: number type, and shape of one row's share."""
    if storage == "float16":
        return {"features": (FEATURE_TYPE, (tokens, width))}
    return {"features": (np.dtype("|i1"), (tokens, width)), "scales": (FEATURE_TYPE, (width,))}


def row_bytes(storage: Storage, tokens: int, width: int) -> int:
    """Bytes of disk that the features of a row take."""
    parts = parts_of(storage, tokens, width).values()
    return sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in parts)


def pack(storage: Storage, features: np.ndarray) -> list[np.ndarray]:
    """Features fp16 [T, D] -> a row's share of each dataset in `parts_of`."""
    features = np.require(features, FEATURE_TYPE, ["C", "W"])  # torch wants to be allowed to write
    return [features] if storage == "float16" else list(quantise(features))


def checksum(parts: Sequence[np.ndarray], kind: str = "xxh3", seed: int = 0) -> int:
    """xxh3 (XXH3, 64 bits) or crc32 over the bytes of contiguous arrays, one after the other."""
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

    |features - int8 * scales| <= scales / 2 everywhere. What `dequantise` makes of them is quantised to the
    same again, unless a scale is subnormal.
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
    """int8 [T, D] and fp16 scales [D] -> their products, rounded once, in `out`, fp16 [T, D]."""
    _convert(quantised * scales.astype(np.float32), out)


def _convert(source: np.ndarray, target: np.ndarray) -> None:
    """Copy to another number type. numpy converts fp16 one number at a time; torch is 10 times as fast."""
    import torch  # here, so that `extract inspect` starts without it

    numbers, converted = torch.from_numpy(source).view(-1), torch.from_numpy(target).view(-1)
    for start in range(0, len(numbers), SERIAL):
        converted[start : start + SERIAL] = numbers[start : start + SERIAL]
