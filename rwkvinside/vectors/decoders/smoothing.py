"""Decoded text made smoother by a local causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...errors import UserError

REQUEST = "Write the last of these sentences again, so that it follows smoothly from those before. Write only it."


class Smoother:
    """A local causal language model that writes on from decoded sentences, greedily.

    A model with a chat template is asked to write the last sentence again; any other one continues the text, as it can
    do nothing else.

    Args:
        folder: of the model and its tokenizer.
        new_tokens: to write at most.

    Raises:
        UserError: there is no model.
    """

    def __init__(self, folder: Path, new_tokens: int = 40):
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} holds no model: it has no config.json", "give the directory of a causal model")
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._new_tokens = new_tokens

    def __call__(self, texts: Sequence[str]) -> str:
        """Return what the model writes after texts, in order; the oldest are cut where there is no room for them."""
        prompt = " ".join(texts)
        if self._tokenizer.chat_template:
            message = [{"role": "user", "content": f"{REQUEST}\n\n{prompt}"}]
            prompt = str(self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        ids = self._tokenizer(prompt, return_tensors="pt")["input_ids"]
        room = getattr(self._model.config, "max_position_embeddings", ids.shape[1] + self._new_tokens)
        ids = ids[:, -max(1, room - self._new_tokens) :]
        with torch.no_grad():
            out = self._model.generate(ids, max_new_tokens=self._new_tokens, do_sample=False)
        return str(self._tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()
