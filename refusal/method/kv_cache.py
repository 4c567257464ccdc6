"""A KV cache that no decoding step copies, with rows that come and go.

Keys and values are allocated once, [slots, n_kv_heads, columns, head_dim] a layer. A row of the batch lives in a slot, its
last token in the column that all rows share, so a step writes one column in place and hands attention a view. The
live rows are the first slots: a row that leaves is replaced by the last one, and new rows are copied behind it. Where
the columns run out the window of live columns moves back to the start; `columns` says how seldom.

Every layer keeps all columns, sliding-window layers too: there the model's own mask does the windowing, by distances between
columns, which are distances between positions since a row's tokens are side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class _Window:
    """What a step sees: the first `rows` slots, and columns `first` to `end`, where the new token goes."""

    rows: int = 0
    first: int = 0
    end: int = 0


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, n_kv_heads, columns, head_dim]."""

    def __init__(self, slots: int, columns: int, window: _Window):
        super().__init__()
        self.slots, self.columns, self.window = slots, columns, window
        self.keys: Tensor
        self.values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, since what is masked is still multiplied by 0, and memory as found may hold NaN.
        self.keys, self.values = (
            states.new_zeros(self.slots, states.shape[1], self.columns, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, first, end = self.window.rows, self.window.first, self.window.end
        last = end + key_states.shape[2]
        self.keys[:rows, :, end:last] = key_states
        self.values[:rows, :, end:last] = value_states
        return self.keys[:rows, :, first:last], self.values[:rows, :, first:last]

    def get_seq_length(self) -> int:
        return self.window.end - self.window.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The cache of a batch whose rows end in one column.

    slots: rows at most. columns: at least the longest row at its end; as many more as steps may pass between two moves of the
    window. Before a step say what it sees (`set_view`), after it that a column was written (`advance`).
    """

    def __init__(self, n_layers: int, slots: int, columns: int):
        self.window, self.columns = _Window(), columns
        self.kept = [_SlotLayer(slots, columns, self.window) for _ in range(n_layers)]
        super().__init__(layers=[*self.kept])

    @property
    def end(self) -> int:
        """The column that the next token goes to."""
        return self.window.end

    def set_view(self, rows: int, width: int) -> None:
        """The next step is of the first `rows` slots and sees the last `width` columns and its own."""
        self.window.rows, self.window.first = rows, self.window.end - width

    def advance(self) -> None:
        """A column was written."""
        self.window.end += 1

    def clear(self, slot: int, rows: int) -> None:
        """Leaves nothing in the slots from `slot` on of rows that had them: those may have overflowed, and what is masked is
        still multiplied by 0."""
        for kept in self._tensors():
            kept[slot : slot + rows] = 0

    def enter(self, slot: int, layers: Sequence[tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """Copies rows into the slots from `slot` on: keys and values [rows, n_kv_heads, seq, head_dim] of each layer, of which
        the first `lengths[row]` positions are the row's own; the last of them goes before the common column."""
        for layer, states in zip(self.kept, layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(*states)
            for kept, new in zip((layer.keys, layer.values), states, strict=True):
                row = 0
                for n, alike in groupby(lengths):  # side by side: one copy
                    last = row + len(list(alike))
                    kept[slot + row : slot + last, :, self.end - n : self.end] = new[row:last, :, :n]
                    row = last

    def move_rows(self, into: Sequence[int], source: Sequence[int]) -> None:
        """Slot `into[i]` takes what slot `source[i]` holds; no slot is in both."""
        for kept in self._tensors():
            kept[list(into), :, : self.end] = kept[list(source), :, : self.end]

    def move_window(self, end: int, rows: int, width: int) -> None:
        """The last `width` columns of the first `rows` slots end in column `end` from here on."""
        for kept in self._tensors():
            kept[:rows, :, end - width : end] = kept[:rows, :, self.end - width : self.end].clone()  # they may overlap
        self.window.end = end

    def _tensors(self) -> list[Float[Tensor, "slots n_kv_heads columns head_dim"]]:
        return [kept for layer in self.kept if layer.is_initialized for kept in (layer.keys, layer.values)]
