"""The cache in slots against one that concatenates, row by row."""

import torch

from refusal.method.kv_cache import SlotCache

HEADS, SIZE, LAYERS = 2, 3, 2


def states(rows: int, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(rows, HEADS, n, SIZE), torch.randn(rows, HEADS, n, SIZE)) for _ in range(LAYERS)]


def test_rows_that_enter_step_leave_and_move():
    torch.manual_seed(0)
    slots, columns, start = 3, 14, 6
    cache = SlotCache(LAYERS, slots, columns)
    cache.window.end = start
    rows: list[list[list[torch.Tensor]]] = []  # of each slot, layer, keys and values: [n_kv_heads, its own tokens, head_dim]
    stores, moved, n_sick = set(), 0, 0
    for step in range(60):
        while len(rows) < slots and (not rows or step % 3 == 0):
            lengths = [int(torch.randint(0, start + 1, ())) for _ in range(1 + (len(rows) < slots - 1 and step % 2))]
            new = states(len(lengths), max(lengths) + 1)  # padded on the right
            if step % 4 == 1:  # the last of the rows has overflowed
                for t in (t for layer in new for t in layer):
                    t[-1] = torch.inf
                n_sick += lengths[-1] > 0
            cache.clear(len(rows), len(lengths))
            cache.enter(len(rows), new, lengths)
            rows += [[[t[i, :, :n] for t in layer] for layer in new] for i, n in enumerate(lengths)]
        width = max(row[0][0].shape[1] for row in rows)
        if cache.end == columns:
            cache.move_window(max(width, start), len(rows), width)
            moved += 1
        cache.set_view(len(rows), width)
        assert cache.get_seq_length() == width and cache.get_mask_sizes(1, 0) == (width + 1, 0)
        for layer, new in enumerate(states(len(rows), 1)):
            seen = cache.update(*new, layer)
            for which, (view, added) in enumerate(zip(seen, new, strict=True)):
                assert view.shape == (len(rows), HEADS, width + 1, SIZE)
                stores.add(view.untyped_storage().data_ptr())
                for i, row in enumerate(rows):
                    row[layer][which] = torch.cat([row[layer][which], added[i]], dim=1)
                    assert torch.equal(view[i, :, width + 1 - row[layer][which].shape[1] :], row[layer][which])
                    # What a row sees of others is masked, which only keeps out what is finite.
                    assert view[i].isfinite().all() == row[layer][which].isfinite().all()
        cache.advance()
        if step % 4 == 3 or width > 6:  # the longest row leaves, and the last one takes its slot
            gone = max(range(len(rows)), key=lambda i: rows[i][0][0].shape[1])
            last = rows.pop()
            if gone < len(rows):
                cache.move_rows([gone], [len(rows)])
                rows[gone] = last
    assert moved > 2 and n_sick > 2
    assert len(stores) == 2 * LAYERS  # allocated once: what attention saw were views
