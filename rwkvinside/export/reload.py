"""Loads an exported directory as a user would, with torch and transformers only, in a separate process.

Executed by path (`python -I reload.py DIR REQUEST RESULT THREADS SAMPLE ADAPTERS`), never imported. REQUEST is a
safetensors file with `input_ids` (B, T). RESULT gets logits: of a full pass in fp32, of a pass in pieces through the
cache, with the directories ADAPTERS loaded by PEFT, and in the stored dtype; and the token ids of the text SAMPLE
(empty if the directory has no tokenizer).
"""

import sys


class Blocked:
    """Import hook that hides the training package even where it is installed."""

    def find_spec(self, name, path=None, target=None):
        """Refuse to import the training package."""
        if name.split(".")[0] == "rwkvinside":
            raise ImportError(f"an exported model imported {name}: it must be self-contained")


def main(folder: str, request: str, result: str, threads: str, sample: str, adapters: str) -> None:
    """Load the directory and write what it computes; arguments as of the process."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    def load(dtype):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        if any(info.values()):
            raise RuntimeError(f"weights do not fit the model: {info}")
        return model.eval()

    torch.set_grad_enabled(False)
    torch.set_num_threads(int(threads))  # as in the process that compares, so that sums have the same order
    ids = load_file(request)["input_ids"]
    tokens = ids.shape[1]
    model = load(torch.float32)
    full = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    pieces = [tokens // 2, 1, 1, tokens - tokens // 2 - 2]
    cached = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(pieces, dim=1)], 1)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)  # has to run; the text does not matter
    for i, name in enumerate(adapters.split()):
        from peft import PeftModel

        # PEFT takes two adapters of one name and kind for one, of which each directory holds only a part
        model = PeftModel.from_pretrained(model.merge_and_unload() if i else model, f"{folder}/{name}")
    adapted = model(ids, use_cache=False).logits
    del model
    stored = load("auto")(ids, use_cache=False).logits.float()
    sample_ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(sample)["input_ids"] if sample else []
    results = {"full": full, "cached": cached, "adapted": adapted, "stored": stored}
    save_file({name: t.clone() for name, t in results.items()} | {"sample_ids": torch.tensor(sample_ids)}, result)


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocked())
    main(*sys.argv[1:])
