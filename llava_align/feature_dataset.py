"""Feature shards as a `torch.utils.data.Dataset`."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch.utils.data import Dataset

from llava_core.errors import LlavaError
from llava_core.identity import EncoderIdentity
from llava_core.shards.dialogue import Turns
from llava_core.shards.folder import find_shards, require_one_encoder
from llava_core.shards.reader import Shard

Rows: TypeAlias = "slice | Sequence[int] | Sequence[bool] | np.ndarray | torch.Tensor"
"""A slice, indices in any order, or a mask with one bool per row."""


class FeatureRow(NamedTuple):
    """One row of a shard; torch's `default_collate` makes a batch of several."""

    features: torch.Tensor
    """fp16 [T, D]: every visual token of the image, in the encoder's width."""
    text: str
    """Its caption; in a shard of conversations, the dialogue as JSON, which `FeatureDataset.turns` parses."""
    id: str
    url: str
    """Address or path of the image, as the source had it."""
    fingerprint: str
    """The encoder's, with its layer and preprocessing: `AlignedModel` refuses features of another one."""


class FeatureDataset(Dataset[FeatureRow]):
    """The rows that have features, of one or several folders of shards, in the order of shards and rows.

    Works with DataLoader workers, forked or spawned: shards are read by plain system calls. A row's checksum
    is verified when a process first reads it.

    Raises LlavaError if there is no shard, one is damaged, or features are of different encoders.
    """

    def __init__(self, path: str | Path | Sequence[str | Path], rows: Rows | None = None) -> None:
        """`path`: a folder of shards, one shard, or several of either; `rows`: as for `select`, or all."""
        paths = [path] if isinstance(path, (str, Path)) else list(path)
        if not paths:
            raise LlavaError(
                "no features", expected="a folder of shards, a shard, or some of either", got="none"
            )
        self.shards: list[Shard] = [shard for each in paths for shard in find_shards(Path(each))]
        require_one_encoder(self.shards)
        self._rows = np.array(
            [(s, row) for s, shard in enumerate(self.shards) for row in shard.ok_rows()], np.int64
        ).reshape(-1, 2)
        self.left_out = sum(shard.rows for shard in self.shards) - len(self._rows)
        """Rows of the shards without features, such as failed downloads; 0 in a selection of rows."""
        if rows is not None:
            self._select(rows)

    def select(self, rows: Rows) -> FeatureDataset:
        """Some of the rows, with the same shards: by a slice, by indices in any order, or by a mask of bools.

        Raises TypeError for anything else, and IndexError beyond the end or for a mask of another length.
        """
        chosen = copy.copy(self)
        chosen._select(rows)
        return chosen

    def _select(self, rows: Rows) -> None:
        if not isinstance(rows, slice):
            given = np.asarray(rows)
            if given.ndim != 1 or (given.size and given.dtype.kind not in "iub"):
                got = f"{given.dtype} {list(given.shape)}"
                raise TypeError(f"expected a slice, a list of indices or a mask of bools; got {got}")
            chosen = given if given.dtype.kind == "b" else given.astype(np.int64)
        self._rows, self.left_out = self._rows[rows if isinstance(rows, slice) else chosen], 0

    @property
    def identity(self) -> EncoderIdentity:
        """The encoder, its layer and its preprocessing, which projectors trained on these features need."""
        return self.shards[0].identity

    @property
    def shape(self) -> tuple[int, int]:
        """(T, D) of each row's features."""
        return self.shards[0].tokens, self.shards[0].width

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> FeatureRow:
        """Reads the features of one row. Raises LlavaError if they are damaged."""
        shard, row = self._place(index)
        features = torch.from_numpy(shard.read(row))
        return FeatureRow(
            features, shard.caption(row), shard.id(row), shard.url(row), self.identity.fingerprint
        )

    def __iter__(self) -> Iterator[FeatureRow]:
        return (self[index] for index in range(len(self)))

    def text(self, index: int) -> str:
        """As `FeatureRow.text`, without reading features."""
        shard, row = self._place(index)
        return shard.caption(row)

    def turns(self, index: int) -> Turns:
        """(question, answer) of each turn; a caption is one answer, to the question None."""
        shard, row = self._place(index)
        return shard.turns(row)

    def __repr__(self) -> str:
        tokens, width = self.shape
        left_out = f", {self.left_out:,} without features left out" if self.left_out else ""
        return f"FeatureDataset({len(self):,} rows of [{tokens}, {width}]{left_out})"

    def _place(self, index: int) -> tuple[Shard, int]:
        try:
            shard, row = self._rows[operator.index(index)]
        except TypeError:
            got = f"got {type(index).__name__}; `select` takes slices, lists and masks"
            raise TypeError(f"expected the index of one row, {got}") from None
        return self.shards[int(shard)], int(row)
