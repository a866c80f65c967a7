"""Where the teacher's side of a distillation comes from: the student's own frozen weights, or a model of its own."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..data.batch import Batch, attention_mask_4d
from ..errors import UserError


class Teacher(Protocol):
    """Yields final hidden states (B, T, D_teacher), without gradient, and the head that turns them into logits."""

    def __call__(self, model, batch: Batch) -> tuple[Tensor, nn.Module]: ...


class SameWeights:
    """The hybrid in teacher mode: one model in memory. Exact only while nothing but mixers was ever trained."""

    def __call__(self, model, batch: Batch) -> tuple[Tensor, nn.Module]:
        return model(batch, mode="teacher", readout=lambda hidden, head: (hidden, head))


class SeparateTeacher:
    """A frozen model beside the student, of the same tokenizer but possibly another size."""

    def __init__(self, lm: PreTrainedModel):
        self.lm = lm.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, model, batch: Batch) -> tuple[Tensor, nn.Module]:
        whole_rows = bool((batch.segment_ids == 1).all())
        hidden = self.lm.model(
            input_ids=batch.input_ids,
            attention_mask=None if whole_rows else attention_mask_4d(batch),
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        return hidden, self.lm.lm_head


def check_same_weights(trained: set[str], mixers: set[str]) -> None:
    """Refuse the one-model teacher when something that the teacher also uses has been trained.

    Raises:
        UserError: names the first such parameter.
    """
    if shared := sorted(trained - mixers):
        raise UserError(
            f"teacher: same cannot be used: {shared[0]} (and {len(shared) - 1} more) was trained, in the teacher too",
            "use teacher: separate, or train only mixer groups",
        )


def load_teacher(path: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """The teacher with its weights, on the CPU, in evaluation mode.

    Args:
        path: local directory or hub id; revision: branch, tag or commit of the hub repository.

    Raises:
        UserError: weights that are missing, damaged, incomplete or not all used.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the weights of teacher {path} cannot be loaded: {reason}",
            "check the directory or the hub id, the network and your access",
        ) from error
    if problems := {kind: sorted(map(str, names)) for kind, names in info.items() if names}:
        raise UserError(f"the weights of teacher {path} do not fit its configuration: {problems}")
    return model.eval()
