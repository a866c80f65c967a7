"""Loading the models of an evaluation: an exported directory, a run in training, the teacher of either."""

from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import UserError
from ..export.huggingface import build_hybrid
from ..runs.directory import RunDirectory
from ..runs.trained import at_stage, open_run
from ..support.quiet import quiet_libraries
from ..support.weight_index import check_shards


def evaluation_dtype(device: str) -> torch.dtype | str:
    """Return fp32 on a CPU, elsewhere the stored dtype, so that large models fit."""
    return torch.float32 if device == "cpu" else "auto"


def load_pretrained(path: str | Path, device: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a causal language model in eval mode.

    Args:
        path: directory or hub id.
        device: where to put it.
        trust_remote_code: run the model code in the directory; exports need it.

    Raises:
        UserError: it cannot be loaded, or its weights do not match its configuration exactly.
    """
    quiet_libraries()
    check_shards(Path(path))
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=evaluation_dtype(device), trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be loaded as a language model: {reason}", "check the directory") from error
    if problems := {kind: sorted(map(str, names)) for kind, names in info.items() if names}:
        raise UserError(
            f"the weights in {path} do not fit its configuration: {problems}", "use a complete model directory"
        )
    return model.to(device).eval()


def load_run(path: Path, device: str, stage: str | None = None) -> PreTrainedModel:
    """Build the student of a run in memory, as its export would be.

    Args:
        path: run directory.
        device: where to put the model.
        stage: take the newest checkpoint of this stage; None is the last finished stage.
    """
    quiet_libraries()
    run = open_run(path)
    if stage is not None:
        run = at_stage(run.directory, stage)
    model = build_hybrid(run.load_model(), run, torch.float32, tie_embeddings=None)
    # A model built to be saved has no values in its table of rotary frequencies, which is not saved.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.to(device).eval()


def load_student(path: Path, device: str, notes: Console) -> PreTrainedModel:
    """Load an exported model, or build the student of a run, in eval mode.

    Args:
        path: exported directory, whose model code is run, or run directory.
        device: where to put the model.
        notes: console for what is being done.

    Raises:
        UserError: it is neither, or cannot be loaded.
    """
    if RunDirectory(path).is_run:
        notes.print(f"building the student of run {path} in memory", highlight=False)
        return load_run(path, device)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is neither an exported model nor a run directory",
            "name a directory with a config.json (an export) or a config.yaml (a run)",
        )
    notes.print(f"loading {path} with its own model code (trust_remote_code)", highlight=False)
    return load_pretrained(path, device, trust_remote_code=True)
