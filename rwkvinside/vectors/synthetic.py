"""Sequences with a rule that can be learned, for tests and gates: they need no text and no embedder.

| name | rule | what it is for |
|---|---|---|
| rotor-lin | one of 4 hidden rotations of 16 dimensions, embedded in 768; which one, the context tells | learning |
| rotor-tanh | the same with a tanh between | better than linear |
| rotor-tmd | two rotations, and the TMD code says which | conditioning |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..support.text import did_you_mean
from .data import VectorData
from .tmd import pack

HIDDEN, WIDTH = 16, 768
DOCUMENTS, LENGTH = 400, 12
SEED = 7  # of the rules, which are the same in every run
NAMES = ("rotor-lin", "rotor-tanh", "rotor-tmd")


def synthetic(name: str) -> VectorData:
    """Return a synthetic data set.

    Raises:
        UserError: there is none of that name.
    """
    if name not in NAMES:
        cause = f"synthetic data {name!r} is not known{did_you_mean(name, NAMES)}"
        raise UserError(cause, f"there are: {', '.join(f'synthetic:{each}' for each in NAMES)}")
    draw = torch.Generator().manual_seed(SEED)
    rules = 2 if name == "rotor-tmd" else 4
    rotations = torch.linalg.qr(torch.randn(rules, HIDDEN, HIDDEN, generator=draw))[0]
    embed = torch.linalg.qr(torch.randn(WIDTH, HIDDEN, generator=draw))[0]
    rule = torch.randint(rules, (DOCUMENTS,), generator=draw)
    state = F.normalize(torch.randn(DOCUMENTS, HIDDEN, generator=draw), dim=-1)
    states = []
    for _ in range(LENGTH):
        states.append(state)
        state = _advance(name, torch.einsum("bij,bj->bi", rotations[rule], state))
    vectors = (torch.stack(states, 1) @ embed.T).flatten(0, 1)
    documents = torch.arange(DOCUMENTS).repeat_interleave(LENGTH)
    codes = pack(15 * rule, 31 * rule, 63 * rule).repeat_interleave(LENGTH) if name == "rotor-tmd" else None
    return VectorData(vectors, documents, None, codes, {"space": f"synthetic:{name}", "dim": WIDTH})


def _advance(name: str, state: Tensor) -> Tensor:
    return F.normalize(torch.tanh(8 * state), dim=-1) if name == "rotor-tanh" else state
