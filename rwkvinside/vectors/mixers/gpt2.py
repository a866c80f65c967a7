"""(Distil)GPT-2 of transformers over vectors: its own stack, without the table of tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, GPT2Config, GPT2Model

from ...errors import UserError
from .base import HistoryMixer, Place, check_heads


class GPT2(HistoryMixer):
    """`transformers.GPT2Model` with `inputs_embeds`, as deep as the model is configured to be.

    The table of tokens stays, with one row that does not train: deleting it would break saving and loading.

    Args:
        heads: of attention; None: one for 64 units.
        max_len: learned positions; longer sequences are refused.
    """

    kind = "gpt2"
    standalone = True

    def __init__(self, d_model: int, place: Place, *, heads: int | None = None, max_len: int = 256):
        super().__init__()
        heads = heads or max(1, d_model // 64)
        check_heads(d_model, heads)
        config = GPT2Config(
            vocab_size=1,
            n_embd=d_model,
            n_layer=place.layers,
            n_head=heads,
            n_positions=max_len,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.max_len = max_len
        self.gpt = GPT2Model(config)
        self.gpt.wte.requires_grad_(False)

    @torch.no_grad()
    def begin_as(self, folder: Path) -> None:
        """Copy positions, blocks and last norm of a language model; its tokens are not needed.

        Raises:
            UserError: another architecture, other shapes, or too few layers or positions.
        """
        names = ("model_type", "n_embd", "n_head", "activation_function", "layer_norm_epsilon")
        wanted = {name: getattr(self.gpt.config, name) for name in names}
        config = AutoConfig.from_pretrained(folder)
        found = {name: getattr(config, name, None) for name in wanted}
        layers, positions = (getattr(config, name, 0) for name in ("n_layer", "n_positions"))
        if found != wanted or layers < self.gpt.config.n_layer or positions < self.max_len:
            raise UserError(
                f"{folder} has {found}, {layers} layers and {positions} positions, "
                f"the model {wanted}, {self.gpt.config.n_layer} and {self.max_len}",
                "set model.d_model, model.layers, model.options.gpt2.heads and .max_len to what it has",
            )
        source = GPT2Model.from_pretrained(folder).state_dict()
        for name, parameter in self.gpt.named_parameters():
            if not name.startswith("wte."):
                parameter.copy_(source[name][: len(parameter)])  # of the positions the first ones

    def run(self, x: Tensor) -> Tensor:
        """Run the stack over whole rows."""
        if x.shape[1] > self.max_len:
            raise ValueError(f"{x.shape[1]} vectors are more than gpt2's max_len={self.max_len}: raise max_len")
        return self.gpt(inputs_embeds=x, use_cache=False).last_hidden_state
