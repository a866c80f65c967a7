"""Greedy generation by every way of reaching a token, for any hybrid model."""

import torch

NEW = 12


def greedy(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **kwargs)[:, -NEW:]


def check_paths(model, prompt):
    """Greedy tokens with cache = without = in chunks = from left-padded rows = continued from a returned cache."""
    expected = greedy(model, prompt, use_cache=False)
    assert expected.unique().numel() > 3, "a model that repeats one token would pass anything"
    assert torch.equal(greedy(model, prompt), expected)
    for chunk in (1, 5, 16):
        assert torch.equal(greedy(model, prompt, prefill_chunk_size=chunk), expected), f"prefill in chunks of {chunk}"

    short = prompt[:1, 8:]
    alone = greedy(model, short)
    padded = torch.cat([torch.cat([torch.zeros(1, 8, dtype=torch.long), short], 1), prompt[1:]])
    mask = torch.ones_like(padded)
    mask[0, :8] = 0
    both = torch.cat([alone, expected[1:]])
    for kwargs in ({}, {"use_cache": False}, {"prefill_chunk_size": 1}, {"prefill_chunk_size": 6}):
        assert torch.equal(greedy(model, padded, attention_mask=mask, **kwargs), both), f"left padding, {kwargs}"

    first = model.generate(prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    again = model.generate(
        first.sequences,
        attention_mask=torch.ones_like(first.sequences),  # generate() would take a generated token 0 for padding
        past_key_values=first.past_key_values,
        max_new_tokens=NEW - 5,
        do_sample=False,
    )
    assert torch.equal(again[:, -NEW:], expected), "continued from the returned cache"
