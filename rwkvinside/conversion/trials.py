"""Short distillations of a student before its layers are scored: each from the same start, and none leaves a trace."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.sources import close, tokens_of
from ..hybrid.model import HybridModel
from ..layer_choice.scores import Kept
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
    plans: tuple[StagePlan, ...], tokenizer: PreTrainedTokenizerBase, vocab: int, world: Distributed
) -> Iterator[TrialSetup | None]:
    """Read the data of short distillations for the block; None where there are none.

    Args:
        plans: of the rounds.
        tokenizer, vocab, world: as of `tokens_of`.
    """
    if not plans:
        yield None
        return
    last = plans[-1]
    run, settings = last.run, last.settings
    tokens, _ = tokens_of(run.data, settings.data, run.endless_tokens, tokenizer, vocab, world)
    try:
        decisive = settings.model_dump(mode="json", include={"data", "batch", "optim", "loss"})
        decisive["optim"].pop("warmup_steps")  # follows from the tokens
        decisive |= {"tokens": tokens.fingerprint, "seed": run.seed, "precision": run.precision}
        identity = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        yield TrialSetup(plans, rows_of(last, tokens), identity)
    finally:
        close(tokens)


class SharedTrials:
    """Trains a student with the attention of some layers put back, and has it scored; `layer_choice` trials.

    Each process takes some of the candidates, and trains them by itself.

    Args:
        student: whose layers are all RWKV, on the device of this process.
        setup: what it trains with.
        world: the processes, all of which ask for the same.
        known: results so far, by candidate and tokens; new ones are added. Those of rank 0 count.
        save: called when new results are known.
        advance: told of steps, done now or before.
    """

    def __init__(
        self,
        student: HybridModel,
        setup: TrialSetup,
        world: Distributed,
        known: MutableMapping[str, float],
        save: Callable[[], None],
        advance: Callable[[int], None],
    ):
        self._student, self._rows, self._world, self._known = student, setup.rows, world, known
        self._plans = {plan.length.total_tokens: plan for plan in setup.plans}
        self._save, self._advance = save, advance

    def __call__(self, candidates: Sequence[Kept], tokens: int, score: Callable[[Kept], float]) -> list[float]:
        """Return scores of students after short distillations; see `layer_choice.scores.Trials`."""
        world, known = self._world, self._known
        names = {kept: f"{','.join(map(str, kept)) or 'none'} {tokens}" for kept in candidates}
        shared = world.all_reduce_sum([float(world.is_main and name in known) for name in names.values()])
        new = [kept for kept, is_known in zip(candidates, shared, strict=True) if not is_known]
        steps = self._plans[tokens].length.steps if tokens else 0
        self._advance(steps * (len(candidates) - len(new)))
        mine = new[world.rank :: world.size]
        for kept in mine:
            known[names[kept]] = self._distilled(kept, self._plans[tokens], score) if tokens else score(kept)
            self._save()
        if new and world.size > 1:
            values = world.all_reduce_sum([known[names[kept]] if kept in mine else 0.0 for kept in new])
            known.update({names[kept]: value for kept, value in zip(new, values, strict=True)})
            self._advance(steps * (len(new) - len(mine)))
            self._save()
        return world.all_reduce_sum([known[name] if world.is_main else 0.0 for name in names.values()])

    def _distilled(self, kept: Kept, plan: StagePlan, score: Callable[[Kept], float]) -> float:
        student = self._student
        with plan.marked(student):
            start = {n: p.detach().to("cpu", copy=True) for n, p in _trainable(student).items()}
            try:
                with torch.enable_grad(), torch.autocast(plan.run.device, enabled=False):
                    self._train(kept, plan)
                return score(kept)
            finally:
                student.recompute(None)
                with torch.no_grad():
                    for name, parameter in _trainable(student).items():
                        parameter.copy_(start[name])

    def _train(self, kept: Kept, plan: StagePlan) -> None:
        student, (phase,) = self._student, plan.phases
        groups = rate_groups(student, plan, phase)
        engine = make_engine(plan, phase, student, Distributed(self._world.device))
        step = DistillStep(SelfTeacher(), plan.loss, dict.fromkeys(kept, "kept"))
        student.recompute(plan.stage.recomputed(plan.settings))
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
