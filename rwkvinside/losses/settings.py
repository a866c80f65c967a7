"""Settings of the losses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..support.settings import Positive, Rate, Section


class DistillLossConfig(Section):
    """What is asked of the logits.

    The divergence at `temperature` is multiplied by its square (Hinton et al. 2015, arXiv 1503.02531).
    """

    divergence: Literal["forward", "reverse", "js"] = Field(
        "forward", description="KL(teacher || student), KL(student || teacher), or Jensen-Shannon."
    )
    top_k: Positive | None = Field(
        None, description="Compare the teacher's k likeliest tokens and the mass of the rest; null: all tokens."
    )
    kl: Rate = Field(1.0, description="Weight of the divergence from the teacher.")
    ce: Rate = Field(0.0, description="Weight of the cross-entropy on the text.")
    router: Rate = Field(0.0, description="Weight of the balance of experts in each row; of a teacher with experts.")
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="Temperature of the divergence.")
    chunk_tokens: Positive | None = Field(
        None, description="Tokens whose logits are in memory at a time; null: 331 of a vocabulary of 152k."
    )
