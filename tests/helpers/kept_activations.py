"""Students and what autograd keeps of their forward, for tests of the plan's counts."""

import contextlib

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rwkvinside.data.batch import Batch
from rwkvinside.hybrid.assemble import apply
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig

ROWS, TOKENS = 2, 256
SIZES = dict(
    hidden_size=96,
    intermediate_size=272,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=131,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)
FAMILIES = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


def student(family="qwen3", preset="cxa079", kept=(), dtype=torch.float32, layers=None, **fields):
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    teacher = model(config(**SIZES)).to(dtype)
    hybrid = HybridModel.from_teacher(teacher, StudentConfig(preset=preset, attention_layers=kept, **fields))
    if layers is not None:
        apply(hybrid, layers)
    return hybrid


def batch():
    ids = torch.randint(0, 131, (ROWS, TOKENS))
    segments = torch.ones_like(ids, dtype=torch.int32)
    segments[:, 128:] = 2
    positions = torch.arange(TOKENS).remainder(128).expand_as(ids)
    return Batch(ids, ids, positions, segments, tuple(range(ROWS)))


def kept_by_autograd(model, *, align, bf16, recompute=None):
    """Bytes a token of everything that the graph of one forward holds, parameters and their casts left out.

    What is held only to compute something again is not seen: see `left_in_memory`.
    """
    model.recompute(recompute)
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        # what scales with the tokens; casts of weights do not
        if storage.data_ptr() not in ours and tensor.numel() >= ROWS * TOKENS:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address comes twice
        return tensor

    weights = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    with precision(bf16), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(batch(), mode="align" if align else "student")
    return sum(n for n, t in found.values() if tuple(t.shape) not in weights) / (ROWS * TOKENS)


def left_in_memory(model, *, align, bf16, recompute=None):
    """Bytes a token by which memory has grown after one forward whose results are still held."""
    model.recompute(recompute)
    with precision(bf16), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as memory:
        held = model(batch(), mode="align" if align else "student")
    grown = sum(event.self_cpu_memory_usage for event in memory.key_averages())
    assert held is not None
    return grown / (ROWS * TOKENS)


def precision(bf16):
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False) if bf16 else contextlib.nullcontext()
