"""Getting the two models of an evaluation: an exported directory, a run in training, and the teacher of either."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import UserError
from ..export.huggingface import build_hybrid
from ..runs.trained import TrainedRun, open_run


def evaluation_dtype(device: str) -> torch.dtype | str:
    """fp32 on a CPU, where nothing is gained by less; elsewhere what is stored, so that large models fit."""
    return torch.float32 if device == "cpu" else "auto"


def load_pretrained(path: str | Path, device: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model from a directory or a hub id, complete, in eval mode, on `device`.

    Args:
        trust_remote_code: run the model code that stands in the directory; exports need it.

    Raises:
        UserError: it cannot be loaded, or its weights are not exactly those of its configuration.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=evaluation_dtype(device), trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be loaded as a language model: {reason}", "check the directory") from error
    if problems := {kind: sorted(map(str, names)) for kind, names in info.items() if names}:
        raise UserError(f"the weights in {path} do not fit its configuration: {problems}", "use a complete one")
    return model.to(device).eval()


def at_stage(run: TrainedRun, stage: str) -> TrainedRun:
    """The same run as it was at the end of `stage`.

    Raises:
        UserError: the stage has no checkpoint.
    """
    checkpoint = run.directory.newest_checkpoint(stage)
    if checkpoint is None:
        raise UserError(f"stage {stage} of {run.path} has no checkpoint", "checkpoint.keep may have been too small")
    return replace(run, stage=stage, checkpoint=checkpoint)


def load_run(path: Path, device: str, stage: str | None = None) -> PreTrainedModel:
    """The student of a run directory as its export would be, built in memory from its newest checkpoint.

    Args:
        stage: name of a stage whose last checkpoint is wanted; None is the last finished one.
    """
    run = open_run(path)
    if stage is not None:
        run = at_stage(run, stage)
    model = build_hybrid(run.load_model(), run, torch.float32, tie_embeddings=None)
    # What is built to be saved leaves the table of rotary frequencies, which is not saved, without values.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.to(device).eval()
