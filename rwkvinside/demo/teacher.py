"""The demo's teacher: a small Qwen3 trained from scratch by a plain transformers loop, kept for the next run.

The loop is deliberately not the project's trainer: the teacher has to be what a newcomer would bring.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from ..support.files import replacing, write_json
from .corpus import Corpus
from .tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

Progress = Callable[[int, float], None]
"""Called after every step with (steps done, loss in nats)."""


@dataclass(frozen=True)
class TeacherSettings:
    """Size and training of the teacher; with the text, the key under which it is kept."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    tokens: int = 1_500_000
    seq_len: int = 512
    rows_per_step: int = 2
    learning_rate: float = 5e-3
    warmup_steps: int = 150
    weight_decay: float = 0.05
    seed: int = 0

    def config(self, vocab_size: int, bos: int, eos: int) -> Qwen3Config:
        """Return the Hugging Face configuration.

        It has grouped-query attention, q/k norms and tied embeddings.
        """
        return Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=4096,  # trained on seq_len only; the speed measurement goes beyond it
            tie_word_embeddings=True,
            bos_token_id=bos,
            eos_token_id=eos,
        )

    @property
    def steps(self) -> int:
        """Number of optimizer steps that read `tokens`, rounded up."""
        return math.ceil(self.tokens / (self.rows_per_step * self.seq_len))

    def key(self, corpus: Corpus) -> str:
        """Return a hash (hex) of the settings and the text."""
        content = json.dumps({"settings": asdict(self), "text": corpus.digest}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def token_rows(tokenizer: PreTrainedTokenizerBase, documents: list[str], seq_len: int) -> np.ndarray:
    """Concatenate documents, each followed by eos, and cut them into rows.

    Returns:
        (rows, seq_len + 1) int64 ids; the last id of a row is the first of the next.
    """
    ids = tokenizer(documents, return_attention_mask=False)["input_ids"]
    stream = np.concatenate([np.asarray([*document, tokenizer.eos_token_id], dtype=np.int64) for document in ids])
    count = (len(stream) - 1) // seq_len
    starts = np.arange(count)[:, None] * seq_len
    return stream[starts + np.arange(seq_len + 1)]


def shuffled_rows(rows: np.ndarray, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield endless batches of `size` rows, in a new order in every epoch."""
    generator = np.random.default_rng(seed)
    queue = np.empty(0, dtype=np.int64)
    while True:
        while len(queue) < size:
            queue = np.concatenate([queue, generator.permutation(len(rows))])
        batch, queue = queue[:size], queue[size:]
        yield torch.from_numpy(rows[batch])


def learning_rate(step: int, steps: int, settings: TeacherSettings) -> float:
    """Return the rate of a step: linear warm-up, then a cosine to 2 % of the peak."""
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train_teacher(
    settings: TeacherSettings, tokenizer: PreTrainedTokenizerBase, documents: list[str], progress: Progress
) -> Qwen3ForCausalLM:
    """Train a teacher in fp32 on the CPU; return it in eval mode."""
    torch.manual_seed(settings.seed)
    model = Qwen3ForCausalLM(settings.config(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
    rows = token_rows(tokenizer, documents, settings.seq_len)
    batches = shuffled_rows(rows, settings.rows_per_step, settings.seed)
    model.train()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings)
        batch = next(batches)
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1, loss.item())
    return model.eval()


def obtain_teacher(folder: Path, settings: TeacherSettings, corpus: Corpus, progress: Progress) -> bool:
    """Ensure that `folder` holds the teacher of these settings and this text.

    A matching teacher is kept, another one is replaced. The folder has its name only when it is complete.

    Args:
        folder: model and tokenizer as `save_pretrained` writes them.
        settings: of the teacher.
        corpus: its text.
        progress: called after every step.

    Returns:
        True if the teacher was trained now, False if the one in `folder` was kept.
    """
    key = settings.key(corpus)
    stamp = folder / "demo_teacher.json"
    if stamp.is_file() and json.loads(stamp.read_text())["key"] == key:
        logger.info("teacher %s is already in %s", key, folder)
        return False
    tokenizer = train_tokenizer(corpus.train, settings.vocab_size)
    model = train_teacher(settings, tokenizer, corpus.train, progress)
    with replacing(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        write_json(unfinished / "demo_teacher.json", {"key": key, "settings": asdict(settings)})
        if folder.exists():
            shutil.rmtree(folder)
    return True
