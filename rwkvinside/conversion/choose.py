"""Choosing layers: in a run, and for `rwkvinside layers`, which only says which ones it would choose."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..config.resolve import resolve
from ..config.schema import Config
from ..data.batch import IGNORE, Batch
from ..data.sources import close, tokens_of
from ..errors import UserError
from ..evaluate.recall import RecallPlan, recall_texts
from ..hybrid.layouts import LayerChoice, resolve_layout
from ..hybrid.model import HybridModel
from ..layer_choice.scores import Scores, forwards, measure
from ..report.figures import layers_figure, save_figure
from ..runs.directory import RunDirectory
from ..runs.layer_scores import PICTURE, Scored, read_scores, write_scores
from ..runs.trained import TrainedRun, at_stage, check_teacher
from ..stages.rows import validation_batches
from ..support.lock import locked
from ..support.progress import Progress
from ..support.quiet import quiet_libraries
from ..teacher.load import open_tokenizer
from ..training.precision import precision_context
from ..training.process_group import Distributed

RECALL_LENGTH, RECALL_TEXTS = 256, 16  # tokens of a text, and how many
LAYERS = "attention_layers"  # in the state of the checkpoint of a stage that has chosen


def choose_layers(
    directory: RunDirectory,
    before: str,
    student: HybridModel,
    batches: Sequence[Batch],
    choice: LayerChoice,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None],
) -> tuple[tuple[int, ...], Scores]:
    """Return the layers that keep attention, and the scores that say so.

    Scores that the run has of this student and text are used again; new ones are written next to them, with a picture.

    Args:
        directory: of the run.
        before: the finished stage that has left the student.
        student: all layers RWKV, with the teacher's attention.
        batches: of held-out text, where the student is.
        choice: how many, by which method, and what they must fulfill.
        tokenizer: of the teacher.
        say: prints a line.
    """
    record = directory.records.finished(before)
    of = Scored(record.run, record.digest, str(record.checkpoint), _digest(batches))
    known = {method: Scores(**fields) for method, fields in read_scores(directory.path, of).items()}
    scores = known.get(choice.choose)
    if scores is not None and scores.serves(choice):
        say(f"{choice.choose}: scores of {directory.path / 'layers.json'} are used again")
    else:
        total = forwards(choice, len(student.rwkv_layers), len(batches))
        with Progress(choice.choose, total, unit="forwards", stream=sys.stdout) as progress:
            scores = measure(student, batches, choice, partial(recall_rows, tokenizer), progress.advance)
        known[choice.choose] = scores
        write_scores(directory.path, of, {method: asdict(found) for method, found in known.items()})
    if scores.warning:
        say(f"warning: {choice.choose} says little here: {scores.warning}")
    kept = scores.select(choice)
    figure = layers_figure({method: found.layers for method, found in known.items()}, choice.choose, kept)
    save_figure(figure, directory.path / PICTURE)
    return kept, scores


def recall_rows(tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Return texts of the task "pairs" as rows whose labels are the answers, on the CPU."""
    texts = recall_texts(tokenizer, RecallPlan((RECALL_LENGTH,), samples=RECALL_TEXTS), None, ["pairs"])["pairs"]
    ids = torch.tensor([text.ids for text in texts])
    labels = torch.full_like(ids, IGNORE)
    for row, text in enumerate(texts):
        for answer in text.answers:
            labels[row, answer.start - 1] = ids[row, answer.start]
    positions = torch.arange(RECALL_LENGTH).expand_as(ids).clone()
    return Batch(ids, labels, positions, torch.ones_like(ids, dtype=torch.int32), tuple(range(len(texts))))


def held_out(batches: Sequence[Batch], tokens: int, device: torch.device) -> list[Batch]:
    """Return the first validation batches, with at most so many tokens but at least one batch, on a device."""
    chosen, total = [], 0
    for batch in batches:
        total += batch.num_tokens
        if chosen and total > tokens:
            break
        chosen.append(batch.to(device))
    return chosen


def layers_of_run(run: Path, wanted: dict, tokens: int) -> tuple[tuple[int, ...], Scores]:
    """Return the layers that a run's student would keep, as `rwkvinside layers` says, and their scores.

    The student is that of the last finished stage that trained nothing but mixers.

    Args:
        run: directory of a run whose layers are all RWKV up to that stage.
        wanted: the choice as `student.attention_layers` has it.
        tokens: of the run's validation data that are measured at most.

    Raises:
        UserError: no such stage, a student with other layers, a choice that cannot be fulfilled.
    """
    quiet_libraries()
    directory = RunDirectory(run)
    trained, config = _aligned(directory)
    plan = resolve(config, [trained.stage])
    stage, device = plan.stage(trained.stage), torch.device(plan.settings.device)
    count = trained.teacher_config().num_hidden_layers
    try:
        choice = resolve_layout(wanted, count)
    except ValueError as error:
        raise UserError(f"the choice {error}", "see rwkvinside layers --help") from error
    if not isinstance(choice, LayerChoice):
        raise UserError(f"{wanted['choose']} measures nothing", "write it into the configuration of a run")
    with locked(directory.path):
        check_teacher(trained)
        student = trained.load_model()
        if len(student.rwkv_layers) < count:
            kept = sorted(set(range(count)) - set(student.rwkv_layers))
            cause = f"the student of {run} keeps attention in layers {kept} already"
            raise UserError(cause, "choose on a run with student.attention_layers=none")
        tokenizer, world = open_tokenizer(config.teacher), Distributed(plan.settings.device)
        vocab = student.lm.config.vocab_size
        data, val = tokens_of(plan.settings.data, stage.settings.data, 0, tokenizer, vocab, world)
        close(data)
        held = validation_batches(stage, val, student.lm.config.max_position_embeddings)
        batches = held_out(held, tokens, device)
        with precision_context(plan.settings.precision, device):
            return choose_layers(directory, trained.stage, student.to(device), batches, choice, tokenizer, print)


def _aligned(directory: RunDirectory) -> tuple[TrainedRun, Config]:
    """Return a run at its last stage that trained mixers alone, and its configuration."""
    config = Config.model_validate(directory.config())
    for name in reversed(directory.finished()):
        kind = resolve(config, [name]).stage(name).stage
        if kind.needs_attention and not kind.chooses_layers:
            return at_stage(directory, name), config
    raise UserError(
        f"{directory.path} has finished no stage that fits mixers to their attention",
        "run calibrate, better align too; --teacher calibrates a student for the purpose",
    )


def _digest(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch.input_ids.cpu().numpy().tobytes())
        digest.update(batch.labels.cpu().numpy().tobytes())
    return digest.hexdigest()
