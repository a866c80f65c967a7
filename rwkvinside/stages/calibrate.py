"""Calibrate: fit each mixer to the teacher's attention, in closed form.

Fitted are decay, rate, bonus, the window's weight and the output projection; with a window each layer then keeps the
share of this that brings the student closest to its teacher (`shares`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UserError
from ..support.progress import Progress
from ..support.text import rounded_count
from .base import StageSize
from .untrained import UntrainedStage

if TYPE_CHECKING:
    from ..data.batch import Batch
    from ..hybrid.model import HybridModel
    from ..teacher.kinds import TeacherKind
    from .plan import StagePlan

FP32 = 4
SHORT = 0.25  # mean length of documents in a row's length, below which a row is read as one document


class Calibrate(UntrainedStage):
    """Start of the mixers: each layer is fitted by search and least squares.

    Nothing trains.
    """

    objective = "calibrate"
    small = StageSize("4k", 512, 4096)
    large = StageSize("16k", 2048, 16384)

    def check(self, student: HybridModel, plan: StagePlan) -> None:
        """Refuse quantized mixers, too, and those without a decay."""
        super().check(student, plan)
        if any(mixer.linear_attention for mixer in student.mixer_configs.values()):
            raise UserError(
                "objective calibrate fits decay and in-context learning rate, and linear attention has none",
                f"leave {plan.name} out of run",
            )
        if fitted := student.mixer_names() - set(student.canonical_parameters()):
            raise UserError(
                f"objective calibrate fits the mixers, but {min(fitted)} is quantized",
                f"set stages.{plan.name}.quantize of this stage to groups without mixers",
            )

    def fit(self, student: HybridModel, batches: list[Batch], progress: Progress) -> dict:
        """Fit every mixer in place.

        Args:
            student: with its teacher's attention.
            batches: of the stage's rows, on the student's device.
            progress: counts the layers; shares have a part of it.

        Returns:
            The stage's own row of metrics.jsonl: lists per head by field and layer.
        """
        from dataclasses import fields

        from ..hybrid.calibration import Calibrated, LayerFit, calibrate
        from .shares import choose_shares, most_trials, split_rows

        windowed = {i: mixer for i, mixer in student.mixers.items() if mixer.mixer_config.window}
        projections = {i: mixer.output.weight.detach().to("cpu", copy=True) for i, mixer in windowed.items()}
        if windowed and _are_short(batches):
            batches = [batch.joined() for batch in batches]
        to_fit, held = split_rows(batches) if windowed else (batches, [])
        fits = calibrate(student, to_fit, lambda layer: progress.advance())
        row = {f.name: {str(i): getattr(fit, f.name) for i, fit in fits.items()} for f in fields(LayerFit)}
        if windowed:
            layers = {i: Calibrated.of(mixer, projections[i]) for i, mixer in windowed.items()}
            with progress.part("shares", most_trials(len(layers)), unit="students") as part:
                shares = choose_shares(student, layers, held, part.advance)
            row["share"] = {str(i): share for i, share in shares.items()}
        return row

    def held_bytes(self, student: HybridModel, plan: StagePlan) -> int:
        """Return the bytes that calibration holds.

        They are those of all tokens (hidden states of teacher and student, the latter's normed form, the teacher's
        heads, what later mixers read, inputs and targets of the output projection, as they are and weighted, and what
        is left of these) and those of one batch (the inputs of a recurrence, and features and targets in two
        precisions). On a CPU, in addition, the output projections of mixers with a window, as they were and as fitted.
        """
        mixers, seq_len = student.mixer_configs.values(), plan.length.seq_len
        C = max(mixer.num_heads * mixer.head_size for mixer in mixers)
        K = max(mixer.num_kv_heads * mixer.head_size for mixer in mixers)
        token_bytes = FP32 * (7 * student.lm.config.hidden_size + 3 * C + 2 * K)
        copies = 2 * FP32 * student.lm.config.hidden_size * C * sum(bool(mixer.window) for mixer in mixers)
        held = plan.length.total_tokens * token_bytes + plan.shape.micro_rows * seq_len * FP32 * 25 * C
        return held + (copies if plan.run.device == "cpu" else 0)

    def summary(self, student: HybridModel, plan: StagePlan, kind: TeacherKind | None) -> list[str]:
        """Return a table of what is fitted."""
        lines = [f"{'group':<12}{'parameters':>12}  in this stage"]
        for group, _, count in student.group_table():
            state = "fitted" if group.startswith("mixer.") else "frozen"
            lines.append(f"{group:<12}{rounded_count(count):>12}  {state}")
        quantized: dict[tuple[str, str], int] = {}
        for name, layer in student.quantized.items():
            key = student.group_of(f"{name}.weight")[-1], layer.format
            quantized[key] = quantized.get(key, 0) + layer.weight_numel
        for (group, number_format), count in quantized.items():
            lines.append(f"{group:<12}{rounded_count(count):>12}  frozen in {number_format}")
        return lines


def _are_short(batches: list[Batch]) -> bool:
    """Return whether documents are short next to the rows.

    Then next to nothing of a row lies beyond the windows, and what is fitted to it harms in longer documents: on
    conversations of 290 tokens SmolLM2, with sums of window and recurrence, ends at a KL of 1.66 in a document of
    4,000, read as one at 0.80 (docs/benchmarks.md).
    """
    tokens, documents = (sum(int(x) for x in counts) for counts in zip(*map(_counts, batches), strict=True))
    return tokens < SHORT * documents * batches[0].input_ids.shape[1]


def _counts(batch: Batch) -> tuple[int, int]:
    return batch.num_tokens, int(batch.segment_ids.amax(1).sum())  # a row's documents are 1, 2, ...
