"""What an export is compared on: fixed tokens, logits of the trained model, its tokenizer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data.batch import IGNORE, Batch
from ..errors import VerificationError
from ..hybrid.assemble import adapter_names, make_plain
from ..hybrid.lm_head import Logits
from ..hybrid.model import HybridModel
from ..runs.trained import TrainedRun

PLAIN_TOLERANCE = 1e-5  # of logits of 1 and less, else relative to the largest: sums in another order
ROWS, TOKENS, SEED = 2, 41, 0  # 41: not a multiple of any backend's chunk


def fixed_batch(vocabulary: int) -> Batch:
    """Return the tokens that every export is compared on, two rows of random ids below `vocabulary`."""
    return batch_of(torch.randint(vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(SEED)))


def batch_of(ids: Tensor) -> Batch:
    """Return rows (B, T) of one document each as a batch without targets."""
    rows, tokens = ids.shape
    return Batch(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE),
        position_ids=torch.arange(tokens).repeat(rows, 1),
        segment_ids=torch.ones_like(ids, dtype=torch.int32),
        rows=tuple(range(rows)),
    )


@torch.no_grad()
def student_logits(model: HybridModel, batch: Batch) -> Tensor:
    """Return the student's logits (B, T, V)."""
    return model(batch, mode="student", task=Logits())


def make_plain_alike(model: HybridModel) -> None:
    """Unpack quantized weights and merge adapters, in place.

    Raises:
        VerificationError: that changes what the model computes.
    """
    batch = fixed_batch(model.lm.config.vocab_size)
    before = student_logits(model, batch) if model.quantized or adapter_names(model) else None
    make_plain(model)
    if before is not None:
        change, largest = max_difference(student_logits(model, batch), before), before.abs().max().item()
        if not change <= PLAIN_TOLERANCE * max(1.0, largest):
            raise VerificationError(f"unpacking and merging changes logits by {change:.3g}")


def max_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference."""
    return (a - b).abs().max().item()


def mean_kl(reference: Tensor, logits: Tensor) -> float:
    """Return the mean KL divergence, in nats, from the distribution of reference logits (..., V) to that of others."""
    log_p, log_q = F.log_softmax(reference, -1), F.log_softmax(logits, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def run_tokenizer(run: TrainedRun) -> PreTrainedTokenizerBase | None:
    """Return the teacher's tokenizer as the run used it, None where it has none."""
    folder, trusted = run.teacher_files(), bool(run.config["teacher"].get("trust_remote_code"))
    if not any(folder.glob("tokenizer*")):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
