"""Teachers small enough to be made anew by every test file: a tokenizer of bytes, a random Qwen3."""

import json

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


def byte_tokenizer(*special, **options):
    """One id per byte (256 of them), then the special tokens; ids can be read back as text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **options)


def save_qwen3(folder, tokenizer, seed=0, **changes):
    """A random teacher of three layers and its tokenizer, with other fields of its configuration on request."""
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    Qwen3ForCausalLM(Qwen3Config(**fields | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_configuration(folder, **changes):
    """A directory with nothing but the config.json of a small teacher; its path as text."""
    fields = {
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 67,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields | changes))
    return str(folder)


def save_texts(file, count=40):
    """A .jsonl file of `count` short texts of different lengths."""
    lines = [json.dumps({"text": f"{file.stem} {i}: " + "the quick brown fox " * (i % 5 + 1)}) for i in range(count)]
    file.write_text("\n".join(lines) + "\n")
