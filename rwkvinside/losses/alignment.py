"""The layer-alignment loss."""

from __future__ import annotations

import torch
from torch import Tensor


def alignment_loss(errors: dict[int, tuple[Tensor, Tensor]], norms: dict[int, float]) -> tuple[Tensor, Tensor]:
    """Return the layers' squared errors relative to their mean squared teacher norms.

    The per-layer weights 1 / norms are those of RADLADS (arXiv 2505.03005, step 1) up to a common factor. They are
    constants measured before the stage, not statistics of the micro-batch, so that the loss does not depend on how a
    batch is cut.

    Args:
        errors: {layer: (squared error, squared teacher norm)}, 0-d sums over real tokens.
        norms: {layer: mean squared norm of the teacher's attention output per token}.

    Returns:
        The mean over layers (0-d, fp32, carries gradient) and the value per layer (detached), both sums over tokens.
    """
    relative = torch.stack([errors[i][0] / norms[i] for i in sorted(errors)])
    return relative.mean(), relative.detach()
