"""The verbs of the command line as functions: `import rwkvinside as rw`, then `rw.train(...)`.

Each function imports what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config.schema import Config


def plan(config: Config, *, stages: Sequence[str] | None = None, ranks: int = 1, gpu: str | None = None) -> str:
    """Return what a run would do, as text, without loading weights.

        config = rw.load_config(teacher="Qwen3-0.6B", data=["train.jsonl"])
        print(rw.plan(config))

    Args:
        config: from `load_config`.
        stages: those to show; None is all that the configuration runs.
        ranks: processes that share the work.
        gpu: name of a GPU that is not here, such as "H100"; None: the device of this machine.

    Raises:
        UserError: not a configuration, a setting that does not fit the student's layers and parameters, or an unknown
            GPU.
    """
    from .config.schema import check_config
    from .planning.fitting import resolve_fitted
    from .planning.plan import plan_text
    from .support.text import listed

    check_config(config)
    stages = stages if stages is None else listed(stages)
    return plan_text(resolve_fitted(config, stages, ranks, gpu=gpu), config, gpu)


def export(run: str | Path, out: str | Path, to: str = "hf", **options: Any) -> dict:
    """Write the last finished stage of a run in another format and verify it.

        report = rw.export("run", "student", dtype="bfloat16")
        print(report["verification"]["max_difference"])

    Args:
        run: run directory.
        out: directory or file to create.
        to: a format of `rwkvinside.export.registry`: "hf" is Hugging Face transformers, "mlx" mlx-lm on Apple silicon,
            "gguf" llama.cpp, "rwkv-infer" RWKV-Infer.
        **options: of the format, see `rwkvinside.export.huggingface.export_hf`,
            `rwkvinside.export.mlx.write.export_mlx`, `rwkvinside.export.gguf.write.export_gguf` and
            `rwkvinside.export.rwkv_infer.export_rwkv_infer`.

    Returns:
        The record of the export: source, student, measurements, verification.

    Raises:
        UserError: an unknown format, a run that is not finished, an output that is not empty.
        VerificationError: the export does not reproduce the trained model; nothing is left at `out`.
    """
    from .export import registry

    return registry.export(run, out, to, **options)


def verify(directory: str | Path, against: str | Path) -> dict:
    """Compare an export with the run it was made from.

        result = rw.verify("student", against="run")
        print(result["max_difference"], result["tolerance"])

    Args:
        directory: what was exported: a directory or a file.
        against: run directory.

    Returns:
        The differences and their tolerances, see `rwkvinside.export.verify.compare`.

    Raises:
        UserError: not an export, or a run that cannot be read.
        VerificationError: a difference exceeds its tolerance.
    """
    from .export import registry

    return registry.verify(directory, against)


def layers(run: str | Path, keep: int, *, choose: str = "restore", tokens: int = 64_000, **options: int) -> dict:
    """Measure which layers of a run's student should keep attention, and choose.

        found = rw.layers("run", keep=9)
        print(found["layers"])  # for student.attention_layers

    Args:
        run: directory of a run whose layers are all RWKV in its last stage that trained nothing but mixers.
        keep: layers that keep attention.
        choose: "error", "restore", "swap" or "greedy", see docs/layers.md.
        tokens: of the run's validation data, at most.
        **options: `max_gap` and `max_run`, most RWKV and most attention layers in a row; `distill`, tokens on which
            restore trains each candidate at most before it is scored.

    Returns:
        "layers", ascending; "scores", one for each layer; "tokens" that were measured; "base", the KL with RWKV in all
        layers (None where the method has none).

    Raises:
        UserError: no such student, an unknown method, a choice that cannot be fulfilled.
    """
    from .conversion.choose import layers_of_run

    kept, scores = layers_of_run(Path(run), {"choose": choose, "keep": keep, **options}, tokens)
    return {"layers": list(kept), "scores": scores.layers, "tokens": scores.tokens, "base": scores.base}


def evaluate(
    student: str | Path,
    teacher: str | Path | None = None,
    *,
    data: Sequence[str | Path] = (),
    max_documents: int | None = None,
    max_length: int | None = None,
    recall_lengths: Sequence[int] = (),
    tasks: Sequence[str] = (),
    device: str = "auto",
) -> dict:
    """Measure how close a student is to its teacher on text, in recall and in tasks; print nothing.

        scores = rw.evaluate("student", "Qwen/Qwen3-0.6B", data=["val.jsonl"])
        print(scores["kl"], scores["agreement"])

    Args:
        student: exported directory, whose model code is run, or run directory.
        teacher: preset, hub id or directory; None is the one that a run names.
        data: files or directories of text; one alone needs no list.
        max_documents: evaluate at most the first so many.
        max_length: evaluate at most so many tokens of a document; None is 4096, or the teacher's longest context where
            that is shorter.
        recall_lengths: tokens of texts in which something is to be found again; (): not measured.
        tasks: of lm-evaluation-harness; (): none.
        device: "auto", "cpu" or "cuda".

    Returns:
        KL, cross entropies, perplexities and agreement, over all tokens and by position, "recall" and "tasks": the JSON
        of `rwkvinside eval`.

    Raises:
        UserError: a directory that is neither a model nor a run, no teacher, data that cannot be read.
    """
    from .config.teacher_lookup import teacher_path
    from .evaluate.compare import Measures, Tasks, evaluate_saved
    from .evaluate.recall import RecallPlan
    from .support.system import check_device
    from .support.text import listed

    measures = Measures(
        tuple(map(str, listed(data))),
        max_documents,
        max_length,
        recall=RecallPlan(tuple(recall_lengths)) if recall_lengths else None,
        tasks=Tasks(tuple(listed(tasks))) if tasks else None,
    )
    check_device(device)  # before the hub is asked for a teacher
    source = None if teacher is None else teacher_path(str(teacher))
    return evaluate_saved(student, source, measures, device=device).to_dict()
