"""Choosing layers: in a run, and for `rwkvinside layers`, which only says which ones it would choose."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..config.resolve import resolve, trial_plans
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
from ..runs.layer_scores import FILE, PICTURE, LayerScores, Scored, read_scores, write_scores
from ..runs.trained import TrainedRun, at_stage, check_teacher
from ..stages.choose import trial_lines
from ..stages.plan import StagePlan
from ..stages.rows import validation_batches
from ..support.lock import locked
from ..support.progress import Progress
from ..support.quiet import quiet_libraries
from ..teacher.load import open_tokenizer
from ..training.precision import precision_context
from ..training.process_group import Distributed
from .trials import SharedTrials, TrialSetup, trial_setup

RECALL_LENGTH, RECALL_TEXTS = 256, 16  # tokens of a text, and how many
LAYERS = "attention_layers"  # in the state of the checkpoint of a stage that has chosen


def choose_layers(
    directory: RunDirectory,
    before: str,
    student: HybridModel,
    batches: Sequence[Batch],
    choice: LayerChoice,
    tokenizer: PreTrainedTokenizerBase,
    trials: tuple[StagePlan, ...],
    world: Distributed,
    say: Callable[[str], None],
) -> tuple[tuple[int, ...], Scores]:
    """Return the layers that keep attention, and the scores that say so.

    Scores that the run has of this student and text are used again; new ones are written next to them, with a picture,
    on rank 0.

    Args:
        directory: of the run.
        before: the finished stage that has left the student.
        student: all layers RWKV, with the teacher's attention.
        batches: of held-out text, where the student is.
        choice: how many, by which method, and what they must fulfill.
        tokenizer: of the teacher.
        trials: how candidates are distilled first, `StagePlan.trials`.
        world: the processes that are here: with trials all of them, else rank 0 alone.
        say: prints a line, on rank 0.
    """
    record = directory.records.finished(before)
    of = Scored(record.run, record.digest, str(record.checkpoint), _digest(batches))
    known, method = read_scores(directory.path, of) if world.is_main else LayerScores(), choice.method

    def save() -> None:
        if world.is_main:
            write_scores(directory.path, of, known)

    with trial_setup(trials, tokenizer, student.lm.config.vocab_size, world) as setup:
        # scores of short distillations are of what these train with; they are put together again from single trials
        scores = Scores(**known.scores[method]) if method in known.scores and setup is None else None
        if scores is not None and scores.serves(choice):
            say(f"{method}: scores of {directory.path / FILE} are used again")
        else:
            recall = partial(recall_rows, tokenizer)
            if setup is None:
                scores = _measured(student, batches, choice, recall)
            else:
                results = known.trials.setdefault(setup.identity, {})
                if results:
                    say(f"{method}: {len(results)} trials of {directory.path / FILE} are used again")
                scores = _tried(student, batches, choice, recall, setup, world, results, save)
            known.scores[method] = asdict(scores)
            save()
    if scores.warning:
        say(f"warning: {method} says little here: {scores.warning}")
    kept = scores.select(choice)
    if world.is_main:
        figure = layers_figure({name: found["layers"] for name, found in known.scores.items()}, method, kept)
        save_figure(figure, directory.path / PICTURE)
    return kept, scores


def _measured(
    student: HybridModel,
    batches: Sequence[Batch],
    choice: LayerChoice,
    recall: Callable[[], Batch],
) -> Scores:
    """Return new scores, while a bar shows how far they are."""
    total = forwards(choice, len(student.rwkv_layers), len(batches))
    with Progress(choice.method, total, unit="forwards", stream=sys.stdout) as progress:
        return measure(student, batches, choice, recall, progress.advance)


def _tried(
    student: HybridModel,
    batches: Sequence[Batch],
    choice: LayerChoice,
    recall: Callable[[], Batch],
    setup: TrialSetup,
    world: Distributed,
    results: dict[str, float],
    save: Callable[[], None],
) -> Scores:
    """Return new scores of short distillations, while a bar of rank 0 shows how far they are.

    Args:
        student, batches, choice, recall: as of `measure`.
        setup, world, save: as of `SharedTrials`.
        results: those that are known.
    """
    layers = len(student.rwkv_layers)
    most, number = -(-forwards(choice, layers, len(batches)) // world.size), itertools.count(1)  # of this process
    with Progress(choice.method, (1 + layers) * setup.steps, unit="steps", stream=sys.stdout) as progress:

        def scored() -> None:
            progress.advance(0, f"{next(number):,}/{most:,} forwards of scoring")

        advance, scoring = (progress.advance, scored) if world.is_main else (_ignore, _ignore)
        trials = SharedTrials(student, setup, world, results, save, advance)
        return measure(student, batches, choice, recall, scoring, trials)


def _ignore(count: int = 1) -> None:
    """Show nothing."""


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
    choice = measured_choice(wanted, count)
    with locked(directory.path):
        check_teacher(trained)
        student = trained.load_model()
        if len(student.rwkv_layers) < count:
            kept = sorted(set(range(count)) - set(student.rwkv_layers))
            cause = f"the student of {run} keeps attention in layers {kept} already"
            raise UserError(cause, "choose on a run with student.attention_layers=none")
        trials = trial_plans(config, plan.settings, choice)
        for line in trial_lines(trials, count, 1):
            print(line)
        tokenizer, world = open_tokenizer(config.teacher), Distributed(plan.settings.device)
        vocab = student.lm.config.vocab_size
        # as much as the run has read, of which the same documents are held out
        sources = plan.settings.data, stage.settings.data, plan.settings.endless_tokens
        data, val = tokens_of(*sources, tokenizer, vocab, world)
        close(data)
        held = validation_batches(stage, val, student.lm.config.max_position_embeddings)
        batches = held_out(held, tokens, device)
        with precision_context(plan.settings.precision, device):
            student = student.to(device)
            return choose_layers(directory, trained.stage, student, batches, choice, tokenizer, trials, world, print)


def measured_choice(wanted: dict, count: int) -> LayerChoice:
    """Return a choice by measurement.

    Args:
        wanted: as of `layers_of_run`.
        count: layers of the model.

    Raises:
        UserError: it cannot be fulfilled, or measures nothing.
    """
    try:
        choice = resolve_layout(wanted, count)
    except ValueError as error:
        raise UserError(f"the choice {error}", "see rwkvinside layers --help") from error
    if not isinstance(choice, LayerChoice):
        raise UserError(f"{wanted['choose']} measures nothing", "write it into the configuration of a run")
    return choice


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
