"""What a stage does unless told otherwise, by objective and teacher width: the one place that knows these numbers.

Sources: RADLADS (arXiv 2505.03005) and HALO (arXiv 2601.22156) for teachers of width 1024 and more; below that,
measurements on stories260k (width 64).
"""

from __future__ import annotations

SMALL = 1024  # narrower teachers are for laptops: short rows, small steps, budgets in minutes

# The stages that every configuration knows, and the objective each of them has.
STAGES = {"calibrate": "calibrate", "align": "align", "distill": "distill", "long": "distill", "sft": "sft"}
RUN = ("calibrate", "align", "distill")


def learning_rates(stage: str, objective: str, width: int) -> dict[str, float]:
    """Learning rates as {"lr": mixers, "lr_rest": everything else, "lr_final": where both end}.

    The published rates, 1e-3 to align and 1e-4 to distill, belong to widths around 4096; what was not replaced learns
    at a tenth of it. Narrower models take larger ones: 1e-3 (4096 / D)^0.67 and 1e-4 (4096 / D)^0.72 pass through
    these and through the rates found for D = 64 (docs/benchmarks.md), 1.6e-2 and 2e-3.
    """
    if objective == "align":
        lr = 1e-3 * (4096 / width) ** 0.67
        return {"lr": lr, "lr_rest": lr, "lr_final": lr / 100}
    lr = 1e-4 * (4096 / width) ** 0.72
    if objective == "sft" or stage == "long":
        return {"lr": lr / 10, "lr_rest": lr / 10, "lr_final": lr / 10}
    return {"lr": lr, "lr_rest": lr / 10, "lr_final": lr / 10 if width >= SMALL else lr / 100}


def stage_defaults(stage: str, objective: str, width: int, max_positions: int) -> dict:
    """Default settings of a stage as plain values; what is missing has one default for all stages, see `config.py`.

    Args:
        stage: its name; only "long" differs from what its objective says.
        objective: calibrate, align, distill or sft.
        width: the teacher's hidden size.
        max_positions: the longest context the teacher was made for, which caps seq_len.
    """
    small = width < SMALL
    kind = "long" if stage == "long" else objective
    tokens, seq_len, step_tokens = {
        "calibrate": ("4k", 512, 4096) if small else ("16k", 2048, 16384),
        "align": ("2M", 512, 4096) if small else ("320M", 512, 16384),
        "distill": ("2M", 512, 4096) if small else ("1B", 4096, 131072),
        "long": ("1M", 1024, 16384) if small else ("100M", 16384, 1572864),
        "sft": ("1M", 512, 4096) if small else ("20M", 4096, 131072),
    }[kind]
    values: dict = {
        "objective": objective,
        "tokens": tokens,
        "data": {"seq_len": min(seq_len, max_positions)},
        "batch": {"tokens": step_tokens},
    }
    if objective != "calibrate":
        values["train"] = ["mixer"] if objective == "align" else [".*"]
        values["optim"] = {"decay": _decay(kind, small)}
    if objective == "distill":
        values["loss"] = {"kl": 1.0, "ce": 0.1 if stage == "long" else 0.0}
    elif objective == "sft":
        values["loss"] = {"kl": 0.0, "ce": 1.0}
    return values


def _decay(kind: str, small: bool) -> dict:
    if kind == "align" or small:
        return {"shape": "cosine", "start": 0.0, "end": 1.0}
    return {"shape": "cosine", "start": 0.833, "end": 0.875}


def warmup_steps(objective: str, steps: int) -> int:
    """50 steps, in a short stage a tenth, at least 10 (mixers diverge if started at the full rate); 3 % for sft."""
    return max(1, round(0.03 * steps)) if objective == "sft" else min(50, max(10, steps // 10), steps)
