"""Keys and values of sequences that grow by different numbers of tokens: allocated once, written in place, never copied to go on.

A token's slot is its place in its row's buffer. Rolling a row back is writing its next keys to an earlier slot.

Shapes: B rows, g key heads, C slots (the capacity), D head size, N new tokens, U slots in use, M moved slots.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, CacheLayerMixin

from specforge.errors import ConfigError


class Slots:
    """Where the rows' next tokens go, in every layer."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.slot_C = torch.arange(capacity, device=device)
        self.start: int | torch.Tensor = 0
        """The first slot to write; [B, 1, 1] where it is not the same in all rows."""
        self.first = 0
        self.stop = 0
        """The slots written in the longest row."""
        self._index: tuple[torch.Tensor, torch.Tensor] | None = None

    def aim(self, lengths: Sequence[int], new_tokens: int) -> None:
        """The next `new_tokens` go behind the first `lengths` tokens of each row.

        Raises:
            ConfigError: a row has no room for them.
        """
        longest, capacity = max(lengths), len(self.slot_C)
        if longest + new_tokens > capacity:
            raise ConfigError(
                f"decode: {longest} tokens of a sequence and {new_tokens} new ones exceed the cache's capacity of {capacity} tokens; "
                f"shorten the prompt, or make room for prompt, answer and one block of drafts."
            )
        self.first, self.stop = longest, longest + new_tokens
        self.start, self._index = longest, None
        if min(lengths) < longest:
            length_B1 = self.on_device(lengths)[:, None]
            row_B1 = torch.arange(len(lengths), device=length_B1.device)[:, None]
            self.start, self._index = length_B1[..., None], (row_B1, length_B1 + self.slot_C[:new_tokens])

    def write(self, buffer_BXC: torch.Tensor, new_BXN: torch.Tensor) -> None:
        """Fill the next slots, which are dimension 2; further dimensions may follow."""
        if self._index is None:
            buffer_BXC[:, :, self.first : self.stop] = new_BXN
        else:
            row_B1, slot_BN = (index.to(buffer_BXC.device) for index in self._index)
            buffer_BXC[row_B1, :, slot_BN] = new_BXN.transpose(1, 2)

    def on_device(self, values: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(values).to(self.slot_C.device, non_blocking=True)


class SlotLayer(CacheLayerMixin):
    """One layer's buffers [B, g, C, D], whose shape and dtype come with the first keys."""

    is_sliding = False

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, since a masked slot still takes part as 0 times its value.
        self.keys, self.values = (x.new_zeros(*x.shape[:2], self.get_max_length(), x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [B, g, N, D] and return views [B, g, U, D] of all slots up to the last one that any row uses."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.slots.write(self.keys, key_states)
        self.slots.write(self.values, value_states)
        return self.keys[:, :, : self.slots.stop], self.values[:, :, : self.slots.stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.stop, 0

    def get_seq_length(self) -> int:
        return self.slots.first

    def get_max_length(self) -> int:
        return len(self.slots.slot_C)

    get_max_cache_shape = get_max_length  # its name in earlier releases of transformers


class SlotCache(Cache):
    """What a decoder of `num_layers` layers remembers of rows of up to `capacity` tokens each."""

    def __init__(self, num_layers: int, capacity: int, device: torch.device) -> None:
        self.slots = Slots(capacity, device)
        super().__init__(layers=[SlotLayer(self.slots) for _ in range(num_layers)])

    def move(self, row_M: torch.Tensor, source_M: torch.Tensor, place_M: torch.Tensor) -> None:
        """Copy slot `source_M` of row `row_M` to slot `place_M`; all are read before any is written."""
        for layer in self.layers:
            for buffer_BgCD in (layer.keys, layer.values):
                row, source, place = (index_M.to(buffer_BgCD.device) for index_M in (row_M, source_M, place_M))
                buffer_BgCD[row, :, place] = buffer_BgCD[row, :, source]


class PassingLayer(CacheLayerMixin):
    """Hands on the keys and values of the forward it is in, and keeps none."""

    is_sliding = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class PassingCache(Cache):
    """What tells transformers that its rows are one text each. Without a cache it asks the device whether their positions jump."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[PassingLayer() for _ in range(num_layers)])
