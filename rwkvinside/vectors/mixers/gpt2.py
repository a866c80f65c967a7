"""(Distil)GPT-2 of transformers over vectors: its own stack, without the table of tokens."""

from __future__ import annotations

from torch import Tensor
from transformers import GPT2Config, GPT2Model

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

    def run(self, x: Tensor) -> Tensor:
        """Run the stack over whole rows."""
        if x.shape[1] > self.max_len:
            raise ValueError(f"{x.shape[1]} vectors are more than gpt2's max_len={self.max_len}: raise max_len")
        return self.gpt(inputs_embeds=x, use_cache=False).last_hidden_state
