"""LSTM, GRU, and the GRU-like recurrence that the RWKV LVM's flow chart names; all on torch's own cells."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .base import Mixer, Place, Shared, State, fp32, real


class _Cells(Mixer):
    """One layer of torch's recurrent cells.

    Args:
        bidirectional: half of the units read backward; then it is not causal and predicts from the last position only.
    """

    cells: type[nn.RNNBase]

    def __init__(self, d_model: int, place: Place, *, bidirectional: bool = False):
        super().__init__()
        if bidirectional and d_model % 2:
            raise ValueError(f"bidirectional needs an even d_model, not {d_model}")
        self.causal = not bidirectional
        width = d_model // 2 if bidirectional else d_model
        self.rnn = self.cells(d_model, width, batch_first=True, bidirectional=bidirectional)

    def mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, shared: Shared
    ) -> tuple[Tensor, State | None]:
        """Run the cells."""
        y, after = run_cells(self.rnn, x, state, lengths)
        return y, after if self.causal else None


class LSTM(_Cells):
    """Hochreiter and Schmidhuber 1997, as `torch.nn.LSTM`; state: h and c, (B, D) each."""

    kind = "lstm"
    cells = nn.LSTM


class GRU(_Cells):
    """Cho et al. 2014, as `torch.nn.GRU`; state: h (B, D)."""

    kind = "gru"
    cells = nn.GRU


class RWKVGRU(Mixer):
    """A GRU with RWKV's three habits: token shift before it, a receptance gate after it, and x added to the outcome.

    The reading of "GRU-based recurrence with custom recurrence tweaks" in the flow chart of the RWKV LVM:
    x'_t = x_t + mu (x_{t-1} - x_t), h = GRU(x'), y = x + W_o (sigmoid(W_r x') h). Without the sum every layer would
    begin by shrinking what tells two inputs apart to a tenth, and six of them learn nothing. State: h and the last
    input, (B, D) each.
    """

    kind = "rwkv_gru"

    def __init__(self, d_model: int, place: Place):
        super().__init__()
        ratio = 1 - place.layer / max(place.layers, 1)
        self.mix_previous = nn.Parameter(torch.linspace(1, 0, d_model) ** ratio / 2)
        self.rnn = nn.GRU(d_model, d_model, batch_first=True)
        self.receptance = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model)

    def mix(self, x: Tensor, state: State | None, lengths: Tensor | None, shared: Shared) -> tuple[Tensor, State]:
        """Run the recurrence."""
        last = x.new_zeros(len(x), x.shape[-1]) if state is None else state[1].to(x.dtype)
        history = torch.cat([last[:, None], x], 1)
        mixed = x + self.mix_previous * (history[:, :-1] - x)
        h, after = run_cells(self.rnn, mixed, state and state[:1], lengths)
        at = x.shape[1] if lengths is None else lengths
        newest = history[torch.arange(len(x), device=x.device), at]
        return x + self.output(torch.sigmoid(self.receptance(mixed)) * h), (*after, fp32(newest))


def run_cells(rnn: nn.RNNBase, x: Tensor, state: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
    """Run one layer of cells over rows whose first tokens count.

    Args:
        rnn: LSTM or GRU of one layer, batch first.
        x: (B, T, D).
        state: h, or h and c, (B, D); None for zeros.
        lengths: (B,); None: all tokens.

    Returns:
        y (B, T, D), and the state; of bidirectional cells it means nothing.
    """
    packed, before = x, None if state is None else tuple(part.to(x.dtype)[None].contiguous() for part in state)
    if lengths is not None:  # a row without any token runs over one that is dropped again below
        packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
    hidden = before if before is None or isinstance(rnn, nn.LSTM) else before[0]
    y, after = rnn(packed, hidden)
    if isinstance(y, PackedSequence):
        y = pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0]
    parts = tuple(part[-1] for part in (after if isinstance(after, tuple) else (after,)))
    if lengths is not None:
        empty = (lengths == 0)[:, None]
        old = state or tuple(torch.zeros_like(part) for part in parts)
        parts = tuple(torch.where(empty, a, b) for a, b in zip(old, parts, strict=True))
        y = y * real(lengths, x.shape[1])[..., None].to(y.dtype)
    return y, tuple(fp32(part) for part in parts)
