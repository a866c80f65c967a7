"""A small model that writes the text of a vector, trained here on the vectors of one space.

The zero-step model of vec2text (Morris et al. 2023, arXiv 2310.06816, section 3.2) in small: a vector becomes a few
tokens that a T5 encoder reads, and its decoder writes. Noise on the training vectors makes it read predictions, which
lie beside the vectors of texts.

INV/config.yaml, metrics.jsonl, stages/    as of a run
INV/tokenizer.json                         byte-level BPE of the training texts
INV/inverter.json                          what it reads, and what was measured at the end; sealed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from ...demo.tokenizer import train_tokenizer
from ...errors import UserError
from ...support.files import write_json
from ...support.lock import locked
from ...support.progress import Progress
from ...support.sealed import read_sealed, sealed
from ...training.callbacks import Evaluate
from ...training.checkpoint import newest_checkpoint, open_checkpoint
from ..data import EpochOrder, VectorData, evenly, validating
from ..fitting import CONFIG, STAGES, claim, fit_phase, load_weights, metrics_of
from ..settings import InverterConfig, PhaseConfig, load_config, write_config
from ..store import read_store
from .scoring import agreement

RESULT, TOKENIZER, PHASE = "inverter.json", "tokenizer.json", "train"
EVALUATED, ROWS = 256, 64  # texts of an evaluation, vectors that are decoded at once
IGNORED = -100


@dataclass(frozen=True)
class TextBatch:
    """Vectors and their texts.

    Attributes:
        rows: their global numbers.
        vectors: (B, d).
        ids: (B, S) tokens of the texts, IGNORED after their ends.
    """

    rows: tuple[int, ...]
    vectors: Tensor
    ids: Tensor

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the texts."""
        return int((self.ids != IGNORED).sum())

    def to(self, device: torch.device) -> Self:
        """Return the same batch on another device."""
        return replace(self, vectors=self.vectors.to(device), ids=self.ids.to(device))


class TextRows:
    """Vectors and texts by global row number, each epoch in an order of its own.

    Args:
        vectors: (N, d).
        texts: N.
        tokenizer: of the texts.
        longest: tokens of a text, its end included; longer ones are cut.
        seed: of the orders.
    """

    def __init__(
        self, vectors: Tensor, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, longest: int, seed: int = 0
    ):
        self.vectors, self.texts = vectors, texts
        self._ids = [
            [*tokenizer(text, add_special_tokens=False)["input_ids"][: longest - 1], tokenizer.eos_token_id]
            for text in texts
        ]
        self._order = EpochOrder(len(texts), seed)

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, rows: Sequence[int]) -> TextBatch:
        """Return the rows with these numbers, any >= 0."""
        return self.at([self._order[row] for row in rows], rows)

    def at(self, places: Sequence[int], rows: Sequence[int] = ()) -> TextBatch:
        """Return texts by their place among these."""
        ids = [torch.tensor(self._ids[place]) for place in places]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=IGNORED)
        return TextBatch(tuple(rows), self.vectors[list(places)], padded)


class Inverter(nn.Module):
    """T5 over a vector.

    Args:
        config: sizes.
        d_in: width of the vectors.
        vocab: ids of the tokenizer.
    """

    def __init__(self, config: InverterConfig, d_in: int, vocab: int):
        super().__init__()
        self.slots, self.d_model, self.noise = config.slots, config.d_model, config.noise
        self.read = nn.Sequential(
            nn.Linear(d_in, config.d_model), nn.GELU(), nn.Linear(config.d_model, config.slots * config.d_model)
        )
        self.t5 = T5ForConditionalGeneration(
            T5Config(
                vocab_size=vocab,
                d_model=config.d_model,
                d_kv=config.d_model // config.heads,
                d_ff=4 * config.d_model,
                num_heads=config.heads,
                num_layers=config.encoder_layers,
                num_decoder_layers=config.layers,
                dropout_rate=0.1,
                pad_token_id=2,  # ids of `train_tokenizer`
                eos_token_id=1,
            )
        )
        self.t5.config.decoder_start_token_id = self.t5.generation_config.decoder_start_token_id = 0

    def forward(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """Return the summed cross-entropy of texts (B, S) given their vectors (B, d); with noise in training."""
        if self.training and self.noise:
            length = vectors.norm(dim=-1, keepdim=True) * self.noise / vectors.shape[-1] ** 0.5
            vectors = vectors + length * torch.randn_like(vectors)
        inputs = self.t5.prepare_decoder_input_ids_from_labels(labels=ids)
        logits = self.t5(inputs_embeds=self._tokens(vectors), decoder_input_ids=inputs).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), ignore_index=IGNORED, reduction="sum")

    @torch.no_grad()
    def write(self, vectors: Tensor, longest: int, beams: int = 1) -> tuple[Tensor, Tensor | None]:
        """Return what it writes, by beam search.

        Args:
            vectors: (B, d).
            longest: tokens of a text.
            beams: texts of a vector, the likeliest first; 1: greedily.

        Returns:
            token ids (B * beams, S), and the logarithm of the likelihood of each text (B * beams,); None if greedy.
        """
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())  # its own is as deep as the encoder
        several = {"num_return_sequences": beams, "length_penalty": 0.0, "output_scores": True}  # scores not per token
        written = self.t5.generate(
            inputs_embeds=self._tokens(vectors),
            max_new_tokens=longest,
            do_sample=False,
            num_beams=beams,
            return_dict_in_generate=True,
            past_key_values=cache,
            **(several if beams > 1 else {}),
        )
        return written.sequences, written.get("sequences_scores")

    def _tokens(self, vectors: Tensor) -> Tensor:
        """Return vectors as tokens (B, slots, D), whatever their length was."""
        return self.read(F.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5).unflatten(-1, (self.slots, -1))


class InverterStep:
    """Cross-entropy of the tokens."""

    def count(self, batch: TextBatch) -> int:
        """Return the number of tokens."""
        return batch.num_tokens

    def __call__(self, model: nn.Module, batch: TextBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss."""
        return cast(Inverter, model)(batch.vectors, batch.ids), {}


@dataclass(frozen=True)
class TrainedInverter:
    """A decoder: an inverter with its tokenizer."""

    model: Inverter
    tokenizer: PreTrainedTokenizerFast
    longest: int

    def decode(self, vectors: Tensor) -> list[str]:
        """Return a text for each of the vectors (N, d); many show progress."""
        texts: list[str] = []
        with Progress("inverter", len(vectors), unit="vectors") as progress:
            for part in vectors.float().split(ROWS):
                texts += self._write(part, 1)[0]
                progress.advance(len(part))
        return texts

    def hypotheses(self, vectors: Tensor, count: int) -> tuple[list[list[str]], Tensor]:
        """Return the likeliest texts of each vector (N, d), more than one, and the logarithms of their likelihood.

        Returns:
            N lists of `count` texts, and (N, count).
        """
        texts, scores = self._write(vectors.float(), count)
        assert scores is not None
        return [texts[at : at + count] for at in range(0, len(texts), count)], scores.cpu().unflatten(0, (-1, count))

    def _write(self, vectors: Tensor, beams: int) -> tuple[list[str], Tensor | None]:
        device = next(self.model.parameters()).device
        ids, scores = self.model.write(vectors.to(device), self.longest, beams)
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True), scores


def train_inverter(config: InverterConfig, say: Callable[[str], None] = print) -> dict:
    """Train an inverter and return what it is and has measured, also in INV/inverter.json.

    An inverter that was interrupted goes on; a finished one is only read.

    Raises:
        UserError: the directory holds something else, or the vectors have no texts.
    """
    out = Path(config.out)
    with locked(out):
        claim(out, config)
        if (out / RESULT).is_file():
            return _read_result(out)
        data = read_store(config.source)
        read, unread, tokenizer = _rows(data, config)
        write_config(config, out / CONFIG)
        tokenizer.backend_tokenizer.save(str(out / TOKENIZER))
        torch.manual_seed(config.seed)
        model = Inverter(config, data.vectors.shape[1], len(tokenizer))
        trained = TrainedInverter(model, tokenizer, config.longest)
        params = sum(p.numel() for p in model.parameters())
        say(f"inverter: {params:,} parameters; {len(read):,} texts to train, {len(unread):,} held out")
        with metrics_of(config) as writer:
            fit_phase(
                model,
                InverterStep(),
                read,
                config,
                PhaseConfig(name=PHASE, steps=config.steps),
                config.longest,
                writer,
                {"seed": config.seed, "data": data.digest},
                [Evaluate(lambda done: {"cross_entropy": _cross_entropy(model, unread)})] if len(unread) else [],
            )
        values = {
            "space": data.card["space"],
            "dim": data.vectors.shape[1],
            "vocab": len(tokenizer),
            "data": data.digest,
            "params": params,
            "train": _agreement(trained, read),
            "held_out": _agreement(trained, unread) if len(unread) else None,
        }
        write_json(out / RESULT, sealed(values))
    return values


def _rows(data: VectorData, config: InverterConfig) -> tuple[TextRows, TextRows, PreTrainedTokenizerFast]:
    """Return texts to train on and those held out, and the tokenizer that is trained on the former."""
    texts = data.texts
    if texts is None:
        raise UserError(f"{config.source} has no texts to learn from", "embed text: rwkvinside vectors embed")
    held = held_out(data, config)
    read, unread = (
        [text for text, is_held in zip(texts, held.tolist(), strict=True) if is_held == own] for own in (False, True)
    )
    tokenizer = train_tokenizer(read, config.vocab)
    return (
        TextRows(data.vectors[~held], read, tokenizer, config.longest, config.seed),
        TextRows(data.vectors[held], unread, tokenizer, config.longest),
        tokenizer,
    )


def held_out(data: VectorData, config: InverterConfig) -> Tensor:
    """Return which texts (N,) an inverter does not read."""
    return validating(data, config.val)[data.documents] & (not config.all_documents)


def _cross_entropy(model: Inverter, rows: TextRows) -> float:
    """Return nats per token of some texts, without noise."""
    training = model.training
    batch = rows.at(evenly(len(rows), EVALUATED).tolist()).to(next(model.parameters()).device)
    with torch.no_grad():
        total = float(model.eval()(batch.vectors, batch.ids)) / batch.num_tokens
    model.train(training)
    return total


def _agreement(trained: TrainedInverter, rows: TextRows) -> dict[str, float]:
    """Return how well some texts are written from their vectors."""
    places = evenly(len(rows), EVALUATED)
    return agreement(trained.decode(rows.vectors[places]), [rows.texts[place] for place in places.tolist()])


def _read_result(folder: Path) -> dict:
    try:
        return read_sealed(folder / RESULT)[0]
    except ValueError as error:
        raise UserError(f"{folder}: {error}", "remove it and train the inverter again") from error


def load_inverter(folder: Path, space: str) -> TrainedInverter:
    """Return the decoder of a trained inverter.

    Raises:
        UserError: there is none, it was changed, or it reads another space.
    """
    if not (folder / RESULT).is_file():
        raise UserError(f"{folder} holds no inverter: it has no {RESULT}", "train one: rwkvinside vectors inverter")
    facts = _read_result(folder)
    if facts["space"] != space:
        raise UserError(
            f"inverter {folder} reads vectors of {facts['space']}, these are of {space}",
            "train one on vectors of this space, or use --decoder retrieval",
        )
    config = load_config(InverterConfig, [folder / CONFIG])
    checkpoint = newest_checkpoint(folder / STAGES / PHASE)
    if checkpoint is None:
        raise UserError(f"{folder} has no checkpoint", "train it again: rwkvinside vectors inverter")
    model = Inverter(config, facts["dim"], facts["vocab"])
    load_weights(model, open_checkpoint(checkpoint))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / TOKENIZER),
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )
    return TrainedInverter(model.eval(), tokenizer, config.longest)
