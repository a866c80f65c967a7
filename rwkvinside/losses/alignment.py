"""The layer-alignment loss."""

from __future__ import annotations

import torch
from torch import Tensor


def alignment_loss(errors: dict[int, tuple[Tensor, Tensor | None]], norms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the layers' squared errors relative to their mean squared teacher norms.

    The per-layer weights 1 / norms are those of RADLADS (arXiv 2505.03005, step 1) up to a common factor. They are
    constants measured before the stage, not statistics of the micro-batch, so that the loss does not depend on how a
    batch is cut.

    Args:
        errors: {layer: (squared error, anything)}, 0-d sums over real tokens.
        norms: (layers,) fp32, mean squared norms of the teacher's attention output per token, in the layers' order.

    Returns:
        The mean over layers (0-d, fp32, carries gradient) and the value per layer (detached), both sums over tokens.
    """
    relative = torch.stack([errors[i][0] for i in sorted(errors)]) / norms
    return relative.mean(), relative.detach()
