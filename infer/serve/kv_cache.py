"""KV cache for continuous batching: sequences of different lengths, each in a row of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from llava_core.errors import LlavaError

GROW_TOKENS = 256
"""Tokens that rows have memory for at first."""


class SlotKVCache(DynamicCache):  # type: ignore[misc]
    """A transformers cache in which every sequence starts at the left of its row and has its own length.

    Nothing moves when a sequence begins or ends, and a step writes one token to each row that it is for. Only
    `update` is transformers' own interface, which has stayed as it is from 4.53 to 5; masks and positions
    are passed to the model by `forward_arguments`. Rows hold zeros or the rest of an earlier sequence, never
    NaN, so masked positions contribute exactly nothing.
    """

    def __init__(self, rows: int, context: int, room: int = GROW_TOKENS) -> None:
        super().__init__()
        self.rows, self.context = rows, context
        self.room = min(room, context)
        """Tokens that each row has memory for; doubles up to `context`, never shrinks."""
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # The current forward pass: rows [B], positions [B, new], longest length, whether it is all rows.
        self._active = self._positions = torch.empty(0, dtype=torch.long)
        self._end, self._all = 0, False

    def forward_arguments(
        self, rows: Sequence[int], held: Sequence[int], new: int, like: torch.Tensor, whole: bool = False
    ) -> dict[str, Any]:
        """Keyword arguments for a forward pass of `new` tokens after the `held` ones of each of these rows.

        Mask [B, 1, new, longest] and positions [B, new], of the dtype and on the device of `like`; `whole`:
        the mask is over all the room, so that it has the same shape whatever the rows hold.
        """
        device, end = like.device, max(held) + new
        assert end <= self.context
        self._grow(end)
        if whole:
            end = self.room
        self._active = torch.tensor(rows, device=device)
        self._end, self._all = end, list(rows) == list(range(self.rows))
        self._positions = torch.tensor(held, device=device)[:, None] + torch.arange(new, device=device)
        hidden = torch.arange(end, device=device) > self._positions[..., None]
        mask = torch.zeros(hidden.shape, dtype=like.dtype, device=device)
        return {
            "past_key_values": self,
            "position_ids": self._positions,
            "attention_mask": mask.masked_fill(hidden, torch.finfo(like.dtype).min)[:, None],
            "use_cache": True,
        }

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values [B, heads, new, width] of this pass; returns all that its rows then hold."""
        if layer_idx not in self._layers:
            self._layers[layer_idx] = (self._empty(key_states), self._empty(value_states))
        keys, values = self._layers[layer_idx]
        return self._put(keys, key_states), self._put(values, value_states)

    def _put(self, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        kept[self._active[:, None], :, self._positions] = new.transpose(1, 2)
        kept = kept[:, :, : self._end]
        return kept if self._all else kept.index_select(0, self._active)

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        return _fixed(like.new_zeros(self.rows, like.shape[1], self.room, like.shape[3]))

    def _grow(self, length: int) -> None:
        before = self.room
        while self.room < length:
            self.room = min(self.context, 2 * self.room)
        if more := self.room - before:
            for index, (keys, values) in self._layers.items():
                keys, values = F.pad(keys, (0, 0, 0, more)), F.pad(values, (0, 0, 0, more))
                self._layers[index] = (_fixed(keys), _fixed(values))

    def copy(self, source: int, row: int, length: int) -> None:
        """The first `length` keys and values of row `source`, in another row, too."""
        for kept in itertools.chain.from_iterable(self._layers.values()):
            kept[row, :, :length] = kept[source, :, :length]

    def clear(self, row: int) -> None:
        """Zeros in place of what a pass that failed may have left, which need not be finite."""
        for keys, values in self._layers.values():
            keys[row], values[row] = 0, 0


def _fixed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, which a CUDA graph may write to where it is."""
    torch._dynamo.mark_static_address(tensor)
    return tensor


def longest_context(config: Any) -> int:
    """Most tokens of a sequence. Raises LlavaError for a model with layers other than attention."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise LlavaError(
            "serve cannot batch this language model",
            expected="layers of attention",
            got=", ".join(sorted(kinds)),
            do="use `infer chat`",
        )
    context = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
    window = getattr(config, "sliding_window", None)
    if window and (not kinds or "sliding_attention" in kinds):
        context = min(context, int(window))  # a sequence of this length fits into the window
    return context
