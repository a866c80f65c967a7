"""What makes a stage what it is: a class per objective.

Everything about an objective is in its file. The configuration asks these classes for defaults and checks, so importing
them is light: what needs torch is imported where it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from ..errors import UserError
from ..support.settings import problem
from ..teacher.kinds import TeacherKind
from .cuda_graphs import uses_graphs

if TYPE_CHECKING:
    from torch import nn

    from ..data.batch import Batch
    from ..data.rows import PackedRows, WholeDocuments
    from ..data.token_store import TokenStore
    from ..hybrid.model import HybridModel
    from ..losses.settings import DistillLossConfig
    from ..teacher.signals import Teacher
    from ..training.protocols import Step
    from .plan import StagePlan
    from .settings import StageConfig

SMALL = 1024  # narrower teachers are for laptops: short rows, small steps, budgets in minutes
STEPS_RATE = 1 / 3  # a default step of an eighth takes half the rate of the mixers (docs/benchmarks.md)
ENOUGH_STEPS = 400  # fewer, and smaller steps leave a student closer to its teacher (docs/benchmarks.md)

WHOLE_STAGE = {"shape": "cosine", "start": 0.0, "end": 1.0}
LATE = {"shape": "cosine", "start": 0.833, "end": 0.875}


class Backward(Enum):
    """What the backward pass of a step goes through."""

    NOTHING = "nothing"
    MIXERS = "each mixer on its own"
    MODEL = "the whole model"


@dataclass(frozen=True)
class StageSize:
    """How much a stage reads unless told otherwise.

    Attributes:
        tokens: of the stage, as written in a configuration.
        seq_len: tokens of a row.
        step_tokens: tokens of an optimizer step, of a stage that is not short.
    """

    tokens: str
    seq_len: int
    step_tokens: int


class Stage(ABC):
    """A stage's objective: its defaults, checks, rows, step and needs.

    Attributes:
        objective: its key in YAML.
        small, large: defaults for teachers narrower than `SMALL`, and for others.
        backward: what a step differentiates.
        needs_attention: runs the teacher's attention next to the mixers, so on the teacher's own weights.
        follows_teacher: its loss compares distributions, so it has a choice of teacher.
        has_loss: `stages.<name>.loss` has a meaning.
        reads_targets: trains on the tokens that the data wants predicted.
        cuts_documents: does not go on with a long document in the next row.
        packs_validation: is judged on such rows too, so that a validation text of any length counts as a whole.
        in_streams: the rows of a step are of as many places in the text, and each goes on in the next step.
        chooses_layers: decides which layers keep attention in the stages after it.
        shrinks_steps: has smaller steps where it is short.
        has_graphs: its micro-batches can run as CUDA graphs.
    """

    objective: ClassVar[str]
    small: ClassVar[StageSize]
    large: ClassVar[StageSize]
    backward: ClassVar[Backward] = Backward.MODEL
    needs_attention: ClassVar[bool] = False
    follows_teacher: ClassVar[bool] = False
    has_loss: ClassVar[bool] = False
    reads_targets: ClassVar[bool] = True
    cuts_documents: ClassVar[bool] = False
    packs_validation: ClassVar[bool] = False
    in_streams: ClassVar[bool] = False
    chooses_layers: ClassVar[bool] = False
    shrinks_steps: ClassVar[bool] = False
    has_graphs: ClassVar[bool] = False

    @property
    def trains(self) -> bool:
        """Whether it has optimizer steps."""
        return self.backward is not Backward.NOTHING

    @property
    def fits(self) -> bool:
        """Whether it computes mixers from activations, in closed form."""
        return not self.trains and not self.chooses_layers

    def recomputed(self, settings: StageConfig) -> str | None:
        """Return what `HybridModel.recompute` takes for a stage with these settings."""
        if settings.activation_checkpointing is True:
            return "mixers" if self.backward is Backward.MIXERS else "layers"
        return settings.activation_checkpointing or None

    # settings

    @classmethod
    def defaults(cls, width: int, max_positions: int) -> dict:
        """Return default settings as plain values.

        What is missing here has one default for all stages (`settings.py`).

        Args:
            width: the teacher's hidden size.
            max_positions: the longest context the teacher was made for, which caps seq_len.
        """
        size = cls.small if width < SMALL else cls.large
        return {
            "objective": cls.objective,
            "tokens": size.tokens,
            "data": {"seq_len": min(size.seq_len, max_positions)},
        }

    @classmethod
    def step_tokens(cls, width: int, tokens: int, seq_len: int) -> int:
        """Return the default tokens of an optimizer step.

        They are halved in a stage that `shrinks_steps` until it has `ENOUGH_STEPS`, or a step is one row.

        Args:
            width: the teacher's hidden size.
            tokens: of the stage.
            seq_len: tokens of a row; a step has one at least.
        """
        step = cls.full_step_tokens(width, seq_len)
        while cls.shrinks_steps and tokens < ENOUGH_STEPS * step and step >= 2 * seq_len:
            step //= 2
        return step

    @classmethod
    def full_step_tokens(cls, width: int, seq_len: int) -> int:
        """Return the default tokens of an optimizer step in a long stage, for which `learning_rates` are meant."""
        return max((cls.small if width < SMALL else cls.large).step_tokens, seq_len)

    @classmethod
    @abstractmethod
    def learning_rates(cls, width: int) -> dict[str, float]:
        """Return the default learning rates by their names in the configuration.

        Args:
            width: the teacher's hidden size.

        Returns:
            {"lr": mixers, "lr_rest": everything else, "lr_final": where both end}; {} for a stage without optimizer.
            Where default steps are smaller than in a long stage, those of mixers are smaller, too: see `STEPS_RATE`.
        """

    @classmethod
    def warmup_steps(cls, steps: int) -> int:
        """Return 50 steps, in a short stage a tenth, at least 10.

        Mixers diverge if they start at the full rate.
        """
        return min(50, max(10, steps // 10), steps)

    @classmethod
    def check_settings(cls, settings: StageConfig) -> None:
        """Refuse settings that mean nothing for this objective.

        Raises:
            PydanticCustomError: what is wrong, for the list of problems of a configuration.
        """
        if cls.backward is not Backward.NOTHING:
            if not settings.train:
                raise problem("train is empty; name groups such as mixer, or regular expressions")
            if settings.optim is None:
                raise problem("optim is null; leave it out for the defaults")
        if cls.has_loss and settings.loss is None:
            raise problem("loss is null; leave it out for the defaults")
        if settings.loss is not None:
            cls.check_loss(settings.loss)
        if settings.stateful and not cls.in_streams:
            raise problem("objective {} begins every row anew: leave out stateful", cls.objective)
        if not cls.follows_teacher and settings.chooses_teacher:
            raise problem(
                "objective {} has no choice of teacher: leave out teacher, teacher_model and teacher_cache",
                cls.objective,
            )

    @classmethod
    def check_loss(cls, loss: DistillLossConfig) -> None:
        """Refuse a loss that means nothing for this objective.

        Raises:
            PydanticCustomError: what is wrong, for the list of problems of a configuration.
        """
        if not cls.has_loss:
            raise problem("objective {} has a fixed loss: leave out loss", cls.objective)

    # the student

    def prepare(self, student: HybridModel, plan: StagePlan, train: Sequence[str]) -> TeacherKind | None:
        """Set what of the student trains, and return where its teacher is.

        Args:
            student: on any device.
            plan: of the stage.
            train: groups or regular expressions (`Phase.train`).

        Returns:
            Where the teacher's side comes from; None: the stage has no exact teacher, and needs none.

        Raises:
            UserError: a pattern matches nothing, or the objective cannot use this student.
        """
        student.set_trainable(train)
        self.check(student, plan)
        uses_graphs(student, plan)  # refuses those that were asked for and cannot be
        return self.teacher_kind(student, plan)

    def check(self, student: HybridModel, plan: StagePlan) -> None:
        """Refuse a student that the objective cannot use.

        The student's shapes suffice.

        Raises:
            UserError: what is wrong and what to do.
        """
        loss = plan.settings.loss
        if loss is not None and loss.router and not student.experts_of_a_token:
            raise UserError(
                f"stages.{plan.name}.loss.router is {loss.router:g}, but the teacher has no routers",
                "leave it at 0: it balances the experts of sparse models",
            )
        if not self.needs_attention:
            return
        if changed := student.teacher_changes():
            raise UserError(
                f"objective {self.objective} needs the teacher's own weights, but {changed[0]} is trained here or "
                "before",
                "train mixer groups only, and run this stage before those that train more",
            )
        if adapters := student.adapters_beside_mixers():
            raise UserError(
                f"objective {self.objective} runs all but the mixers without adapters: {adapters[0]} learns nothing",
                "leave adapters out of the stage's train, or put them on mixers",
            )

    def teacher_kind(self, student: HybridModel, plan: StagePlan) -> TeacherKind | None:
        """Return where the teacher's side of the stage, or of its evaluations, comes from."""
        return None if student.teacher_changes() else TeacherKind.SELF

    # data and steps

    def documents(self, store: TokenStore, seq_len: int, seed: int) -> PackedRows | WholeDocuments:
        """Lay documents out in rows: packed, one document after the other."""
        from ..data.rows import PackedRows

        return PackedRows(store, seq_len, seed)

    @abstractmethod
    def step(
        self, model: nn.Module, teacher: Teacher | None, plan: StagePlan, sample: Callable[[int], list[Batch]]
    ) -> Step[Batch]:
        """Return the step that the trainer takes.

        Args:
            model: the student, or what an engine made of it; called under the engine's autocast.
            teacher: from the kind that `prepare` returns.
            plan: of the stage.
            sample: gives batches of about so many tokens of the stage's rows, on the model's device.
        """

    # planning

    def logit_models(self, kind: TeacherKind | None) -> int:
        """Return how many models' logits a step makes."""
        return 0

    def held_bytes(self, student: HybridModel, plan: StagePlan) -> int:
        """Return bytes that the stage holds in addition to models and steps."""
        return 0

    def summary(self, student: HybridModel, plan: StagePlan, kind: TeacherKind | None) -> list[str]:
        """Return the objective's own lines in the plan.

        They tell steps, learning rates, loss, and what trains.
        """
        from .summary import training_lines

        return training_lines(student, plan, self.loss_lines(plan, kind))

    def loss_lines(self, plan: StagePlan, kind: TeacherKind | None) -> list[str]:
        """Return the plan's lines on what the loss compares, and with which teacher."""
        return []


def language_model_defaults(width: int, *, kl: float, ce: float) -> dict:
    """Return default settings of stages that train the whole model on next tokens.

    Args:
        width: the teacher's hidden size.
        kl, ce: weights of the loss.
    """
    decay = WHOLE_STAGE if width < SMALL else LATE
    return {"train": [".*"], "optim": {"decay": dict(decay)}, "loss": {"kl": kl, "ce": ce}}


def narrow_rate(rate: float, exponent: float, width: int) -> float:
    """Return a learning rate for a width, given the one for widths around 4096.

    Narrower models take larger ones. 1e-3 (4096 / D)^0.83 to align and 1e-4 (4096 / D)^0.72 to distill pass through the
    published rates and through those found for D = 64, 3.2e-2 and 2e-3 (docs/benchmarks.md). Published: RADLADS (arXiv
    2505.03005), HALO (arXiv 2601.22156).
    """
    return rate * (4096 / width) ** exponent
