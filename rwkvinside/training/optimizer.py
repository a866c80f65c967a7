"""AdamW over named parameter groups, and its state as flat named tensors. Knows nothing of schedules or devices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import UserError
from .optimizer_8bit import adamw8bit, load_moments, moments_of
from .settings import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = tuple(f"{moment}_scale" for moment in MOMENTS)  # of 8-bit moments, beside them
STATE = (*MOMENTS, "step")
Groups = Mapping[str, Mapping[str, nn.Parameter]]


def trainable(groups: Groups) -> dict[str, nn.Parameter]:
    """All parameters of the groups by name; no name may stand in two groups.

    Raises:
        UserError: nothing to train.
    """
    parameters = {name: parameter for group in groups.values() for name, parameter in group.items()}
    if not parameters:
        raise UserError("this stage trains no parameter", "name at least one group in stages.<name>.train")
    return parameters


def build_optimizer(groups: Groups, settings: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with up to two parameter groups per learning-rate group (with and without weight decay).

    Each parameter group carries the name of its learning-rate group under "group"; learning rates start at 0 and are
    set before every step. Without 8-bit states it is fused: on CPU a fifth of the plain loop's time.
    """
    parts = []
    for name, parameters in groups.items():
        for decay in (True, False):
            chosen = [p for p in parameters.values() if (p.dim() >= 2) == decay]
            if chosen:
                parts.append({"params": chosen, "group": name, "weight_decay": settings.weight_decay if decay else 0.0})
    if settings.kind != "adamw":
        return adamw8bit(parts, settings.kind, settings.betas, settings.eps)
    return torch.optim.AdamW(parts, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, rates: Mapping[str, float]) -> None:
    """Set the learning rate of every parameter group from the rate of its learning-rate group."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["group"]]


def fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state before the first step, for one parameter or one flat partition."""
    zero = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": zero} | {m: torch.zeros_like(parameter, dtype=torch.float32) for m in MOMENTS}


def check_names(what: str, given: set[str], wanted: set[str]) -> None:
    """Refuse tensors whose names are not exactly those wanted.

    Raises:
        UserError: names the first difference.
    """
    if given != wanted:
        missing, unknown = sorted(wanted - given), sorted(given - wanted)
        first = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not trained here"
        raise UserError(
            f"{what} of the checkpoint do not fit: {first} ({len(missing)} missing, {len(unknown)} unknown)",
            "resume with the settings under `student` and `train` that the checkpoint was made with",
        )


def check_state(state: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse an optimizer state of other parameters (`UserError`)."""
    given = {key for key in state if key.rpartition("/")[2] not in SCALES}
    check_names("optimizer tensors", given, {f"{name}/{part}" for name in parameters for part in STATE})


def plain_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """State of an optimizer that holds the parameters themselves: "<name>/exp_avg", "<name>/exp_avg_sq" and
    "<name>/step", the number of its updates (0-d int64); of 8-bit moments also their scales, "<name>/exp_avg_scale"
    and "<name>/exp_avg_sq_scale". To be saved before the next step: not copied where they are fp32 on the CPU."""
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        own = optimizer.state.get(parameter) or fresh_state(parameter)
        own = moments_of(own) if "state1" in own else own
        fp32 = [part for part in (*MOMENTS, *SCALES) if part in own]
        state |= {f"{name}/{part}": own[part].detach().to("cpu", torch.float32) for part in fp32}
        state[f"{name}/step"] = own["step"].detach().to("cpu", torch.int64, copy=True)
    return state


def load_plain_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Inverse of `plain_state`."""
    check_state(state, parameters)
    for name, parameter in parameters.items():
        if not isinstance(optimizer, torch.optim.AdamW):
            given = {part: state[key] for part in (*STATE, *SCALES) if (key := f"{name}/{part}") in state}
            load_moments(optimizer, parameter, given)
            continue
        own = fresh_state(parameter)
        for part in STATE:
            own[part].copy_(state[f"{name}/{part}"])
        optimizer.state[parameter] = own
