"""The balance of experts: the auxiliary loss of sparse models.

E sum_e f_e p_e of Switch Transformers (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6), f_e the share of tokens
that go to expert e and p_e its mean probability, over all sparse layers together, as transformers computes it. It is a
product of two means, so that of a whole step is no sum over micro-batches. Here it is that of each row, weighed with
the row's targets: how a step is cut into micro-batches and ranks changes nothing, and where a batch is one row it is
transformers' value. Values of rows are at least as large as that of their batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batch import IGNORE, Batch
from ..hybrid.model import Routing


def router_loss(routing: Routing, batch: Batch) -> Tensor:
    """Return the balance of experts summed over the targets of a batch (0-d, at least fp32, carries gradient).

    Args:
        routing: of a forward over the batch.
        batch: its padding is left out.
    """
    logits, chosen = routing
    B, T = batch.input_ids.shape
    experts, device = logits[0].shape[-1], batch.input_ids.device
    real = batch.mask.float()[..., None]
    wide = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    sent, probability = (torch.zeros(B, experts, dtype=wide, device=device) for _ in range(2))
    for layer in logits:
        probabilities = layer.to(device).softmax(-1, dtype=wide)
        choice = probabilities.detach().topk(chosen, dim=-1).indices
        sent = sent + (F.one_hot(choice, experts).sum(1).view(B, T, experts) * real).sum(1)
        probability = probability + (probabilities.view(B, T, experts) * real).sum(1)
    tokens = (len(logits) * real.sum(1)).clamp(min=1)
    balance = experts * (sent / tokens * (probability / tokens)).sum(-1)
    return (balance * (batch.labels != IGNORE).sum(1)).sum()
