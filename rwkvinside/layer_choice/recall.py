"""A synthetic recall of values by keys, in a teacher's own tokens: what a recurrence finds harder than attention.

A row names pairs of random tokens, key and value, and then all keys again in another order, each before its value. Only
these second values count: who attends to the first ones knows them, others can only guess.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..data.batch import IGNORE, Batch

ROWS, PAIRS = 32, 16


def recall_batch(tokens: Sequence[int], first: int | None = None, *, rows: int = ROWS, pairs: int = PAIRS) -> Batch:
    """Return rows of the task, always the same ones, on the CPU.

    Args:
        tokens: that keys and values are drawn from.
        first: token that rows begin with; None: none.
        rows: number of rows.
        pairs: of a row; fewer where there are not twice as many tokens.

    Raises:
        ValueError: there are less than four tokens.
    """
    ids = torch.tensor(sorted(set(tokens)))
    pairs = min(pairs, len(ids) // 2)
    if pairs < 2:
        raise ValueError(f"two pairs need four tokens, there are {len(ids)}")
    draw = torch.Generator().manual_seed(0)
    lines, targets = [], []
    for _ in range(rows):
        chosen = ids[torch.randperm(len(ids), generator=draw)[: 2 * pairs]].view(pairs, 2)
        again = chosen[torch.randperm(pairs, generator=draw)]
        start = torch.tensor([] if first is None else [first], dtype=torch.long)
        line = torch.cat([start, chosen.flatten(), again.flatten()])
        labels = torch.full_like(line, IGNORE)
        labels[-2 * pairs :: 2] = again[:, 1]  # at each key of the second half
        lines.append(line)
        targets.append(labels)
    input_ids = torch.stack(lines)
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids).clone()
    return Batch(
        input_ids, torch.stack(targets), positions, torch.ones_like(input_ids, dtype=torch.int32), tuple(range(rows))
    )
