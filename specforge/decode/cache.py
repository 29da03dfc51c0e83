"""Keys and values of sequences that grow by different numbers of tokens: allocated once, written in place, never copied to go on.

A token's slot is its place in its row's buffer. Rolling a row back is writing its next keys to an earlier slot.

Shapes: B rows, g key heads, C slots (the capacity), D head size, N new tokens, M moved slots.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, CacheLayerMixin

from specforge.errors import ConfigError


class Slots:
    """Where the next keys and values go, in every layer."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.first = 0
        self.stop = 0
        self.index_BN: torch.Tensor | None = None
        """None where all rows write to the slots from `first` to `stop`."""


class SlotLayer(CacheLayerMixin):
    """One layer's buffers [B, g, C, D], whose shape and dtype come with the first keys."""

    is_sliding = False

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, since a masked slot still takes part as 0 times its value.
        self.keys, self.values = (x.new_zeros(*x.shape[:2], self.slots.capacity, x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [B, g, N, D] and return views of all slots up to the last one that any row uses."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, buffer_BgCD: torch.Tensor, new_BgND: torch.Tensor) -> torch.Tensor:
        slots = self.slots
        if slots.index_BN is None:
            buffer_BgCD[:, :, slots.first : slots.stop] = new_BgND
        else:
            row_B1 = torch.arange(len(new_BgND), device=new_BgND.device)[:, None]
            buffer_BgCD[row_B1, :, slots.index_BN.to(new_BgND.device)] = new_BgND.transpose(1, 2)
        return buffer_BgCD[:, :, : slots.stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.stop, 0

    def get_seq_length(self) -> int:
        return self.slots.first

    def get_max_length(self) -> int:
        return self.slots.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.23


class SlotCache(Cache):
    """What a decoder of `num_layers` layers remembers of rows of up to `capacity` tokens each."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.slots = Slots(capacity)
        super().__init__(layers=[SlotLayer(self.slots) for _ in range(num_layers)])

    def aim(self, lengths: Sequence[int], new_tokens: int, index_BN: torch.Tensor) -> None:
        """The next forward writes `new_tokens` behind the first `lengths` tokens of each row; `index_BN` are their slots.

        Raises:
            ConfigError: a row has no room for them.
        """
        slots, longest = self.slots, max(lengths)
        if longest + new_tokens > slots.capacity:
            raise ConfigError(
                f"decode: {longest} tokens of a sequence and {new_tokens} new ones exceed the cache's capacity of {slots.capacity} tokens; "
                f"shorten the prompt, or allow for prompt, answer and one block of drafts."
            )
        slots.first, slots.stop = longest, longest + new_tokens
        slots.index_BN = None if min(lengths) == longest else index_BN

    def move(self, row_M: torch.Tensor, source_M: torch.Tensor, place_M: torch.Tensor) -> None:
        """Copy slot `source_M` of row `row_M` to slot `place_M`; all are read before any is written."""
        for layer in self.layers:
            for buffer_BgCD in (layer.keys, layer.values):
                row, source, place = (index_M.to(buffer_BgCD.device) for index_M in (row_M, source_M, place_M))
                buffer_BgCD[row, :, place] = buffer_BgCD[row, :, source]
