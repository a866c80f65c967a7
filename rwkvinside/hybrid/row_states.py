"""The states in which the rows of a training step end, with which those of the next one begin.

The rows of a step are streams (`data.rows.ContinuedRows`): row i of the run goes on with row i - R, R rows a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ..data.batch import Batch
from ..modeling.time_mixer import MixerState
from ..modeling.window_attention import WindowState
from .carried_rows import CarriedRows, State, stacked
from .model import HybridModel


class RowStates:
    """What every stream of a process has read, by its number, i % R of its rows i.

    A step reads the states of the step before, however often its batches run: what it leaves counts from the next step
    on.

    Args:
        student: on any device.
        streams: R, rows of a step.

    Attributes:
        empty: the state before the first token by layer, of one row, on the CPU.
    """

    def __init__(self, student: HybridModel, streams: int):
        self.empty = empty_states(student)
        self.streams = streams
        self._step: int | None = None
        self._before: dict[int, dict[int, State]] = {}  # by stream and layer, of one row each
        self._after: dict[int, dict[int, State]] = {}

    def enter(self, batch: Batch) -> CarriedRows:
        """Return what the rows of a batch begin with; `leave` takes what they end with."""
        step = batch.rows[0] // self.streams
        if step != self._step:
            self._step, self._before, self._after = step, self._after, {}
        device = batch.input_ids.device
        rows = [self._before.get(row % self.streams, self.empty) for row in batch.rows]
        goes_on = batch.goes_on.to(device)

        def beginning(layer: int) -> State:
            state = stacked([row[layer].map(lambda x: x.to(device)) for row in rows])
            return state.map(lambda x: torch.where(goes_on.view(-1, *[1] * (x.ndim - 1)), x, torch.zeros_like(x)))

        before = {layer: beginning(layer) for layer in self.empty}
        documents = batch.documents
        if documents.alone:
            return CarriedRows(before, None, None, len(rows))
        # by what the host knows: no device is asked
        assert documents.lengths is not None, "rows that go on do not run by graphs"
        ends = torch.tensor(documents.lengths).cumsum(0)
        row_ends = torch.arange(1, len(rows) + 1) * batch.input_ids.shape[1]
        last = torch.searchsorted(ends, row_ends)
        first = torch.cat([last.new_zeros(1), last[:-1] + 1])
        return CarriedRows(before, first.to(device), last.to(device), len(documents.lengths))

    def leave(self, batch: Batch, carried: CarriedRows) -> None:
        """Keep what the rows of a batch end with."""
        for place, row in enumerate(batch.rows):
            self._after[row % self.streams] = {
                layer: state.map(lambda x, place=place: x[place : place + 1]) for layer, state in carried.after.items()
            }

    def tensors(self, streams: range) -> dict[str, Tensor]:
        """Return the states after the last step by name, "3.wkv" and so on, (len(streams), ...) on the device.

        Args:
            streams: of this process.
        """
        return {
            f"{layer}.{name}": torch.cat([dict(_named(self._after[stream][layer]))[name] for stream in streams])
            for layer, state in self.empty.items()
            for name, _ in _named(state)
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` returned for all streams; every process keeps its own once it has read on."""

        def restored(layer: int, stream: int) -> State:
            names = iter([name for name, _ in _named(self.empty[layer])])
            return self.empty[layer].map(lambda _: tensors[f"{layer}.{next(names)}"][stream : stream + 1])

        self._step = None
        self._after = {
            stream: {layer: restored(layer, stream) for layer in self.empty} for stream in range(self.streams)
        }


def empty_states(student: HybridModel) -> dict[int, State]:
    """Return the states of one row before its first token, by the layers that have one of constant size.

    They are on the CPU, in fp32, of a student in fp64 in that.
    """
    dtype = torch.promote_types(torch.float32, student.family.embedding(student.lm).weight.dtype)
    zeros = partial(torch.zeros, dtype=dtype)

    def window(heads: int, slots: int, size: int) -> WindowState:
        return WindowState(*zeros(2, 1, heads, slots, size), seen=torch.zeros(1, dtype=torch.long))

    states: dict[int, State] = {}
    for layer, c in student.mixer_configs.items():
        states[layer] = MixerState(
            wkv=zeros(1, c.num_heads, c.head_size, c.head_size),
            shift=zeros(1, c.hidden_size) if c.token_shift else None,
            window=window(c.num_kv_heads, c.window + c.sinks, c.head_size) if c.window else None,
        )
    for layer, (tokens, sinks) in student.kept_windows.items():
        fields = student.family.attention_fields(student.lm.config, layer)
        states[layer] = window(fields["num_kv_heads"], tokens + sinks, fields["head_size"])
    return dict(sorted(states.items()))


def unbounded_layers(student: HybridModel) -> list[int]:
    """Return the layers whose state would grow with the text: attention that is not cut to a window."""
    bounded = {*student.rwkv_layers, *student.kept_windows}
    return [i for i in range(student.lm.config.num_hidden_layers) if i not in bounded]


def row_bytes(student: HybridModel) -> int:
    """Return the bytes of the states of one row."""
    return sum(x.nbytes for state in empty_states(student).values() for x in state.tensors())


def _named(state: State) -> list[tuple[str, Tensor]]:
    """Return the tensors of a state by name, in the order of `State.tensors`."""
    if isinstance(state, WindowState):
        return [(f"window.{name}", x) for name, x in state._asdict().items()]
    own = [(name, x) for name in ("wkv", "shift") if (x := getattr(state, name)) is not None]
    return own + (_named(state.window) if state.window is not None else [])
