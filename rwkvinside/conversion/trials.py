"""Short distillations of a student before its layers are scored: each from the same start, and none leaves a trace."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.sources import close, tokens_of
from ..hybrid.model import HybridModel
from ..stages.param_groups import rate_groups
from ..stages.plan import StagePlan
from ..stages.rows import Rows, rows_of
from ..stages.steps import DistillStep
from ..teacher.signals import SelfTeacher
from ..training.callbacks import Callback
from ..training.process_group import Distributed
from ..training.trainer import Trainer, TrainingPlan
from .build import make_engine


@dataclass(frozen=True)
class TrialSetup:
    """What short distillations train with.

    Attributes:
        plans: of the rounds, `StagePlan.trials`.
        rows: of the stage `distill`.
        identity: digest of all that decides what a distillation from the same start makes of the student.
    """

    plans: tuple[StagePlan, ...]
    rows: Rows
    identity: str

    @property
    def steps(self) -> int:
        """Optimizer steps of one candidate in all rounds."""
        return sum(plan.length.steps for plan in self.plans)


@contextmanager
def trial_setup(
    plans: tuple[StagePlan, ...], tokenizer: PreTrainedTokenizerBase, vocab: int
) -> Iterator[TrialSetup | None]:
    """Read the data of short distillations, in this process alone, for the block; None where there are none.

    Args:
        plans: of the rounds.
        tokenizer, vocab: as of `tokens_of`.
    """
    if not plans:
        yield None
        return
    last = plans[-1]
    run, settings = last.run, last.settings
    tokens, _ = tokens_of(run.data, settings.data, run.endless_tokens, tokenizer, vocab, Distributed(run.device))
    try:
        decisive = settings.model_dump(mode="json", include={"data", "batch", "optim", "loss"})
        decisive["optim"].pop("warmup_steps")  # follows from the tokens
        decisive |= {"tokens": tokens.fingerprint, "seed": run.seed, "precision": run.precision}
        identity = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        yield TrialSetup(plans, rows_of(last, tokens), identity)
    finally:
        close(tokens)


class Trials:
    """Trains a student with the attention of some layers put back, and has it scored; a `layer_choice` trial.

    Args:
        student: whose layers are all RWKV, on the device of the run.
        setup: what it trains with.
        known: results so far, by candidate and tokens; new ones are added.
        save: called after each new result.
        advance: told of every step, done now or before.
    """

    def __init__(
        self,
        student: HybridModel,
        setup: TrialSetup,
        known: MutableMapping[str, float],
        save: Callable[[], None],
        advance: Callable[[int], None],
    ):
        self._student, self._rows, self._known = student, setup.rows, known
        self._plans = {plan.length.total_tokens: plan for plan in setup.plans}
        self._save, self._advance = save, advance

    def __call__(self, kept: tuple[int, ...], tokens: int, score: Callable[[], float]) -> float:
        """Return a score of the student after a short distillation; see `layer_choice.scores.Trial`."""
        key = f"{','.join(map(str, kept)) or 'none'} {tokens}"
        if key in self._known:
            self._advance(self._plans[tokens].length.steps if tokens else 0)
        else:
            self._known[key] = self._distilled(kept, self._plans[tokens], score) if tokens else score()
            self._save()
        return self._known[key]

    def _distilled(self, kept: tuple[int, ...], plan: StagePlan, score: Callable[[], float]) -> float:
        student = self._student
        with plan.marked(student):
            start = {n: p.detach().to("cpu", copy=True) for n, p in _trainable(student).items()}
            try:
                with torch.enable_grad(), torch.autocast(plan.run.device, enabled=False):
                    self._train(kept, plan)
                return score()
            finally:
                student.train(False)  # where the plan recomputes activations
                with torch.no_grad():
                    for name, parameter in _trainable(student).items():
                        parameter.copy_(start[name])

    def _train(self, kept: tuple[int, ...], plan: StagePlan) -> None:
        student, (phase,) = self._student, plan.phases
        groups = rate_groups(student, plan, phase)
        engine = make_engine(plan, phase, student, Distributed(plan.run.device))
        step = DistillStep(SelfTeacher(), plan.loss, dict.fromkeys(kept, "kept"))
        if plan.settings.activation_checkpointing:
            student.recompute_layers()
        training = TrainingPlan(plan.name, plan.length, plan.schedule(groups), plan.shape.micro_rows)
        Trainer(engine, step, self._rows, training, callbacks=[_Steps(self._advance)]).fit()


class _Steps(Callback):
    """Tells of every step."""

    def __init__(self, advance: Callable[[int], None]):
        self._advance = advance

    def step(self, trainer: Trainer, row: dict) -> None:
        """Count the step."""
        self._advance(1)


def _trainable(student: HybridModel) -> dict[str, Tensor]:
    return {name: p for name, p in student.canonical_parameters().items() if p.requires_grad}
