"""AdamW over named parameter groups, and its state as flat named tensors.

Knows nothing of schedules or devices.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import UserError
from .optimizer_8bit import adamw8bit, load_moments, moments_of
from .settings import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = tuple(f"{moment}_scale" for moment in MOMENTS)  # of 8-bit moments, in addition to them
STATE = (*MOMENTS, "step")
Groups = Mapping[str, Mapping[str, nn.Parameter]]


def trainable(groups: Groups) -> dict[str, nn.Parameter]:
    """Return all parameters of the groups by name.

    No name may be in two groups.

    Raises:
        UserError: nothing to train.
    """
    parameters = {name: parameter for group in groups.values() for name, parameter in group.items()}
    if not parameters:
        raise UserError("this stage trains no parameter", "name at least one group in stages.<name>.train")
    return parameters


def build_optimizer(groups: Groups, settings: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW with one or two parameter groups per learning-rate group.

    One has weight decay (`decays`), the other has none. Each parameter group carries the name of its learning-rate
    group under "group"; learning rates start at 0 and are set before every step. Without 8-bit states it is fused: on
    CPU a fifth of the plain loop's time.
    """
    param_groups = []
    for name, parameters in groups.items():
        for decay in (True, False):
            members = [p for key, p in parameters.items() if decays(key, p) == decay]
            if members:
                weight_decay = settings.weight_decay if decay else 0.0
                param_groups.append({"params": members, "group": name, "weight_decay": weight_decay})
    if settings.kind != "adamw":
        return adamw8bit(param_groups, settings.kind, settings.betas, settings.eps)
    return torch.optim.AdamW(param_groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)


def decays(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter has weight decay.

    Weights of linear layers and embeddings have, and stacks of them (experts). Vectors have none, whatever dimensions
    of size 1 they are stored with, nor have tables that are no `weight`: the low-rank maps and biases of a mixer. So
    does RWKV-7's training code.

    Args:
        name: of the parameter.
        parameter: before it is sharded.
    """
    dimensions = sum(size > 1 for size in parameter.shape)
    return dimensions > 2 or dimensions == 2 and name.endswith("weight")


def set_rates(optimizer: torch.optim.Optimizer, rates: Mapping[str, float]) -> None:
    """Set the learning rate of every parameter group.

    It is the rate of its learning-rate group.
    """
    for group in optimizer.param_groups:
        group["lr"] = rates[group["group"]]


def fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state before the first step.

    It is that of one parameter or of one flat partition.
    """
    zero = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": zero} | {m: torch.zeros_like(parameter, dtype=torch.float32) for m in MOMENTS}


def check_names(what: str, names: set[str], expected: set[str]) -> None:
    """Refuse tensors whose names are not exactly those of the parameters.

    Args:
        what: the tensors are, for the message.
        names: of the tensors.
        expected: names.

    Raises:
        UserError: names the first difference.
    """
    if names != expected:
        missing, unknown = sorted(expected - names), sorted(names - expected)
        first = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not trained here"
        raise UserError(
            f"{what} of the checkpoint do not fit: {first} ({len(missing)} missing, {len(unknown)} unknown)",
            "resume with the settings under `student` and `train` that the checkpoint was made with",
        )


def check_state(state: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse an optimizer state of other parameters (`UserError`)."""
    names = {key for key in state if key.rpartition("/")[2] not in SCALES}
    check_names("optimizer tensors", names, {f"{name}/{entry}" for name in parameters for entry in STATE})


def plain_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the state of an optimizer that holds the parameters themselves.

    To be saved before the next step: what is fp32 on the CPU is not copied.

    Returns:
        "<name>/exp_avg", "<name>/exp_avg_sq" and "<name>/step", the number of its updates (0-d int64); of 8-bit moments
        also their scales, "<name>/exp_avg_scale" and "<name>/exp_avg_sq_scale".
    """
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        entries = optimizer.state.get(parameter) or fresh_state(parameter)
        entries = moments_of(entries) if "state1" in entries else entries
        fp32 = [entry for entry in (*MOMENTS, *SCALES) if entry in entries]
        state |= {f"{name}/{entry}": entries[entry].detach().to("cpu", torch.float32) for entry in fp32}
        state[f"{name}/step"] = entries["step"].detach().to("cpu", torch.int64, copy=True)
    return state


def load_plain_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Set what `plain_state` returned."""
    check_state(state, parameters)
    for name, parameter in parameters.items():
        if not isinstance(optimizer, torch.optim.AdamW):
            entries = {entry: state[key] for entry in (*STATE, *SCALES) if (key := f"{name}/{entry}") in state}
            load_moments(optimizer, parameter, entries)
            continue
        entries = fresh_state(parameter)
        for entry in STATE:
            entries[entry].copy_(state[f"{name}/{entry}"])
        optimizer.state[parameter] = entries
