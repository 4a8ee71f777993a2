"""GGUF, the file format of llama.cpp: metadata and tensors, each in its own number type.

Source: the format's specification (docs/gguf.md of ggml-org/ggml) and the package `gguf`. Types of Q4_K_M are
quantised by llama.cpp itself, through xllamacpp: `gguf` only reads them.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from llava_core.cli.console import ProgressBar
from llava_core.errors import LlavaError

Value = bool | int | float | str | Sequence[Any]
FALLBACK = {
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q5_0: GGMLQuantizationType.F16,
    GGMLQuantizationType.Q8_0: GGMLQuantizationType.F16,
}
"""Type of rows that are no whole number of blocks (256 values in the first two, else 32), as llama-quantize
has it."""
FILE_TYPES = {
    "float32": LlamaFileType.ALL_F32,
    "float16": LlamaFileType.MOSTLY_F16,
    "bfloat16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}
"""By the values of --dtype."""


class Tensor(NamedTuple):
    """One tensor of a file: [..., row], as torch has it."""

    name: str
    data: torch.Tensor
    type: GGMLQuantizationType = GGMLQuantizationType.F32

    @property
    def nbytes(self) -> int:
        values, size = GGML_QUANT_SIZES[self.type]
        return int(self.data.numel() // values * size)

    def encoded(self) -> np.ndarray:
        """The bytes of the file, u1 [nbytes]. Raises LlavaError for numbers beyond float16."""
        array = np.ascontiguousarray(self.data.detach().float().cpu().numpy())
        if self.type in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K):
            return _by_llama_cpp(array, self.type)
        encoded: np.ndarray = gguf.quants.quantize(array, self.type)
        if self.type == GGMLQuantizationType.F16 and not np.isfinite(encoded).all():
            do = "use --dtype bfloat16 or float32"
            raise LlavaError(f"{self.name} has numbers beyond float16", got=abs(array).max(), do=do)
        return encoded.reshape(-1).view(np.uint8)


def fitting(wanted: GGMLQuantizationType, row: int) -> GGMLQuantizationType:
    """`wanted`, or what llama-quantize takes instead for rows of so many values."""
    while row % GGML_QUANT_SIZES[wanted][0]:
        wanted = FALLBACK[wanted]
    return wanted


def require_llama_cpp(what: str) -> str:
    """Path of llama.cpp's library. Raises LlavaError unless xllamacpp is installed."""
    found = importlib.util.find_spec("xllamacpp")
    library = found and importlib.util.find_spec("xllamacpp.xllamacpp")
    if not library or not library.origin:
        raise LlavaError(f"{what} needs llama.cpp", do="pip install xllamacpp")
    return library.origin


def _by_llama_cpp(array: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """f4 [..., row] -> quantised by ggml's own reference, u1 [nbytes]."""
    quantise = ctypes.CDLL(require_llama_cpp("--dtype q4_k_m")).ggml_quantize_chunk
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    quantise.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    quantise.restype = ctypes.c_size_t
    values, size = GGML_QUANT_SIZES[kind]
    out, row = np.empty(array.size // values * size, np.uint8), array.shape[-1]
    written = quantise(int(kind), array.ctypes.data, out.ctypes.data, 0, array.size // row, row, None)
    assert written == out.nbytes
    return out


def write_gguf(
    path: Path, architecture: str, values: Mapping[str, Value], tensors: Sequence[Tensor], bar: ProgressBar
) -> None:
    """Write one file; `bar` counts tensors. An int in `values` is written as u4, a float as f4."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for tensor in tensors:
        shape, none = tensor.data.shape, np.dtype(np.float32)  # the type is the one that is named
        writer.add_tensor_info(tensor.name, shape, none, tensor.nbytes, tensor.type)
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.encoded())
            bar.update()
