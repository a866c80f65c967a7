"""Floating-point operations of a calibration.

Counted are products of matrices as in `flops`, and what solves the ridge regressions. The sums of the regressions per
head are not: they are products of elements.
"""

from __future__ import annotations

from ..hybrid.calibration import HALF_LIVES, RATES, ROUNDS, SEARCHED_TOKENS, STRENGTHS
from ..hybrid.model import HybridModel
from ..stages.plan import StagePlan
from ..stages.shares import held_rows, most_trials
from ..teacher.kinds import TeacherKind
from .flops import training_flops

SEARCHES = 1 + 2 * ROUNDS  # times that the inputs of a search are projected: before it, then for decay and for rate
CANDIDATES = 1 + ROUNDS * (len(HALF_LIVES) + len(RATES))  # recurrences of a search
WALKS = 2  # of the teacher: one that shows how its layers are called, one that calls them


def calibration_flops(student: HybridModel, plan: StagePlan) -> dict[str, float]:
    """Return the operations of the whole stage.

    Args:
        student: on any device; nothing trains.
        plan: of the stage.

    Returns:
        By what they are for: "layers" of teacher and student, "projections" and "recurrence" of the search and the
        regressions, "output" (products of its regression), "solving" (of that), and "shares" of windowed students.
    """
    seq_len, D = plan.length.seq_len, student.lm.config.hidden_size
    mixers = student.mixer_configs.values()
    held = held_rows(plan.row_count, seq_len) if any(mixer.window for mixer in mixers) else 0
    fitted = (plan.row_count - held) * seq_len
    searched = min(fitted, -(-SEARCHED_TOKENS // seq_len) * seq_len)

    forward = training_flops(student, plan, TeacherKind.SELF).forward
    teacher, head = forward.pop("teacher"), forward["head"]
    own = sum(forward.values())
    widths = [mixer.num_heads * mixer.head_size for mixer in mixers]
    outputs = sum(2 * C * D for C in widths)  # of a token through all output projections
    before = forward["mixer.proj"] - outputs + forward["mixer.lora"] + forward.get("window", 0)
    # the target, its difference, products, each strength tried on a half, what is left; and moments
    regressions = outputs * (4 + len(STRENGTHS) / 2) + sum(2 * C * C for C in widths)
    scored = any(mixer.window and mixer.window_mix == "softmax" for mixer in mixers)
    parts = {
        "layers": fitted * (WALKS * (teacher - head) + own - head),
        "projections": ((SEARCHES + scored) * searched + 2 * fitted) * before,
        "recurrence": (CANDIDATES * searched + 2 * fitted) * forward["recurrence"],
        "output": fitted * regressions,
        "solving": sum((1 + len(STRENGTHS)) * (C**3 / 3 + 2 * C * C * D) for C in widths),
    }
    if any(mixer.window for mixer in mixers):  # a single row is fitted and judged
        judged = max(held, 1) * seq_len
        parts["shares"] = judged * (teacher + most_trials(len(widths)) * own)
    return parts
