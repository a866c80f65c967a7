"""A model that is trained from nothing: shapes from a configuration, weights from the seed.

Everything but the RWKV mixers is drawn here; these by `modeling/mixer_init.py`, with the same ideas: each block begins
as nothing on the residual stream, and what feeds it is orthogonal.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..families.registry import find
from ..modeling.mixer_init import orthogonal

HEAD_GAIN = 0.5  # of the head, times sqrt(vocabulary / width) where that is more than 1


@torch.no_grad()
def fresh_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a causal language model as it begins, on the CPU, in evaluation mode.

    | parameter | start |
    |---|---|
    | embedding, norms, routers and experts | the family's own of transformers (a normal of `initializer_range`) |
    | what ends a block (attention and MLP output) | 0 |
    | other linear layers | orthogonal |
    | head | orthogonal, gain 0.5 max(1, sqrt(vocabulary / width)) |

    As RWKV-7's training code (github.com/BlinkDL/RWKV-LM) does, but for the embedding: there it is tiny, and a norm
    after it makes up for that, which the families here do not have.

    Args:
        config: of a family without tied embeddings.
        dtype: of the weights; they are drawn in fp32.
    """
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    family = find(config.model_type)
    for layer in family.layers(lm):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(orthogonal(*module.weight.shape, 0.0 if name in family.block_ends else 1.0))
    head = family.head(lm).weight
    rows, cols = head.shape
    head.copy_(orthogonal(rows, cols, HEAD_GAIN * max(1.0, math.sqrt(rows / cols))))
    return lm.to(dtype).eval()
