"""Loads an exported directory as a user would, with torch and transformers only, in a separate process.

Executed by path (`python -I reload.py DIR REQUEST RESULT FACTS TASK`). REQUEST is a safetensors file with `input_ids`
(B, T) and validation rows `row.0`, ... (T,), each with `probe.0`, ... (T, n) ids. TASK is JSON: threads, directories of
adapters, and texts for the tokenizer (none: the directory has no tokenizer). RESULT gets logits: of a full pass in
fp32, of a pass in pieces through the cache, with the adapters loaded by PEFT, in the stored dtype; those that a batch
with padding generates from, through the cache and without it; of each row those of its probe and the log of the sum of
all exponentials. FACTS gets `tokenizer_facts` as JSON.
"""

import os
import sys
import threading

NEW_TOKENS, PADDING = 8, (0, 7, 20)  # that are generated, and tokens that each prompt of the batch is shorter


class Blocked:
    """Import hook that hides the training package even where it is installed."""

    def find_spec(self, name, path=None, target=None):
        """Refuse to import the training package."""
        if name.split(".")[0] == "rwkvinside":
            raise ImportError(f"an exported model imported {name}: it must be self-contained")


def tokenizer_facts(tokenizer, texts: list[str], render) -> dict:
    """Return what a tokenizer says of texts, ids and conversations, as JSON values.

    Args:
        tokenizer: any.
        texts: to be encoded.
        render: called with keyword arguments of `apply_chat_template` for each of its templates; returns a text.
    """
    count = len(tokenizer)
    spans = [list(range(start, min(start + 32, count))) for start in range(0, count, 32)]
    templates = tokenizer.chat_template or {}
    names = sorted(templates) if isinstance(templates, dict) else [None]
    return {
        "vocabulary": tokenizer.convert_ids_to_tokens(list(range(count))),
        "special tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "decoding": [tokenizer.decode(ids) for ids in spans],
        "decoding without special tokens": [tokenizer.decode(ids, skip_special_tokens=True) for ids in spans],
        "encoding": tokenizer(texts)["input_ids"],
        "chat templates": {
            f"{name or 'default'}, conversation {i + 1}, {'with' if tools else 'no'} tools, prompt {prompt}": render(
                tokenizer, messages, tools=tools, chat_template=name, add_generation_prompt=prompt
            )
            for name in names
            for i, messages in enumerate(CONVERSATIONS)
            for tools in (None, TOOLS)
            for prompt in (False, True)
        },
    }


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look a word up.",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
        },
    }
]
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "naïve"}}}
ASKED = {"role": "user", "content": "What is 2 + 3?"}
CONVERSATIONS = [
    [ASKED],
    [ASKED, {"role": "assistant", "content": "It is 5."}],
    [{"role": "system", "content": "Be brief."}, ASKED, {"role": "assistant", "content": "5"}, ASKED],
    [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "look_up", "content": "simple"},
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\nIt is simple."},
    ],
]


def rendered(tokenizer, messages: list[dict], **options) -> str:
    """Return a rendered conversation, or why the template refuses it."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template may raise whatever it likes: it is compared, too
        return f"{type(error).__name__}: {error}"


def main(folder: str, request: str, result: str, facts: str, task: str) -> None:
    """Load the directory and write what it computes; arguments as of the process."""
    import json
    from pathlib import Path

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    options = json.loads(Path(task).read_text(encoding="utf-8"))

    def load(dtype):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        if any(info.values()):
            raise RuntimeError(f"weights do not fit the model: {info}")
        return model.eval()

    torch.set_grad_enabled(False)
    torch.set_num_threads(options["threads"])  # as in the process that compares, so that sums have the same order
    given = load_file(request)
    ids = given["input_ids"]
    tokens = ids.shape[1]
    model = load(torch.float32)
    results = {"full": model(ids, use_cache=False).logits}
    cache = DynamicCache(config=model.config)
    pieces = [tokens // 2, 1, 1, tokens - tokens // 2 - 2]
    results["cached"] = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(pieces, dim=1)], 1)
    results |= generated(model, ids)
    for i in range(sum(name.startswith("row.") for name in given)):
        logits = model(given[f"row.{i}"][None], use_cache=False).logits[0]
        results[f"row.{i}"] = torch.cat([logits.gather(1, given[f"probe.{i}"]), logits.logsumexp(1, keepdim=True)], 1)
    for i, name in enumerate(options["adapters"]):
        from peft import PeftModel

        # PEFT takes two adapters of one name and kind for one, of which each directory holds only a part
        model = PeftModel.from_pretrained(model.merge_and_unload() if i else model, f"{folder}/{name}")
    results["adapted"] = model(ids, use_cache=False).logits
    del model
    results["stored"] = load("auto")(ids, use_cache=False).logits.float()
    save_file({name: t.clone() for name, t in results.items()}, result)
    if options["texts"]:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        Path(facts).write_text(json.dumps(tokenizer_facts(tokenizer, options["texts"], rendered)), encoding="utf-8")


def generated(model, ids) -> dict:
    """Return logits that prompts of several lengths generate from, and those of the same tokens in one pass each.

    Args:
        model: the exported one.
        ids: (B, T) to take prompts from.

    Returns:
        `generated` and `regenerated`, both (prompts, NEW_TOKENS, V).
    """
    import torch

    prompts = ids[torch.arange(len(PADDING)) % len(ids)].clone()
    mask = torch.ones_like(prompts)
    for i, padding in enumerate(PADDING):
        prompts[i, :padding], mask[i, :padding] = 0, 0
    out = model.generate(
        prompts,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    whole = [model(row[None, padding:], use_cache=False) for row, padding in zip(out.sequences, PADDING, strict=True)]
    again = torch.stack([passed.logits[0, -NEW_TOKENS - 1 : -1] for passed in whole])
    return {"generated": torch.stack(out.logits, 1), "regenerated": again}


def end_with_parent() -> None:
    """End this process when standard input does: whoever started it holds the other end, and may be killed."""
    while os.read(0, 1):  # not sys.stdin, whose lock would be held at the end of the interpreter
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.meta_path.insert(0, Blocked())
    main(*sys.argv[1:])
