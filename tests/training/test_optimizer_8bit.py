"""8-bit optimizers against torch's AdamW."""

import bitsandbytes
import pytest
import torch
from torch import nn

from rwkvinside.errors import UserError
from rwkvinside.training.optimizer_8bit import adamw8bit, load_moments, moments_of


def parameters():
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(100, 130)), nn.Parameter(torch.randn(50)), nn.Parameter(torch.randn(64, 64))]


def train(optimizer, weights, steps):
    for step in steps:
        g = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        for p in weights:
            p.grad = 1e-3 * torch.randn(p.shape, generator=g) * torch.rand(p.shape, generator=g) ** 4
        optimizer.step()


def optimizer_of(weights):
    return adamw8bit([{"params": weights, "weight_decay": 0.1}], "adamw8bit", (0.9, 0.95), 1e-8)


def test_8_bit_moments_resume_bit_for_bit():
    one = parameters()
    straight = optimizer_of(one)
    assert isinstance(straight, bitsandbytes.optim.AdamW8bit)
    train(straight, one, range(12))
    saved = [{k: v.clone() for k, v in moments_of(straight.state[p]).items()} for p in one]
    assert all(t.dtype == torch.float32 for moments in saved for k, t in moments.items() if k != "step")
    two = [nn.Parameter(p.detach().clone()) for p in one]
    resumed = optimizer_of(two)
    for p, moments in zip(two, saved, strict=True):
        load_moments(resumed, p, moments)
    train(straight, one, range(12, 16))
    train(resumed, two, range(12, 16))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_8_bit_moments_follow_adamw_and_take_over_from_it():
    exact, rounded = parameters(), parameters()
    adamw = torch.optim.AdamW(exact, lr=0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    eight = optimizer_of(rounded)
    train(adamw, exact, range(10))
    train(eight, rounded, range(10))
    moved = [(a - b).abs().max().item() for a, b in zip(exact, rounded, strict=True)]
    assert moved[1] < 1e-7  # below 4096 elements nothing is quantized
    assert 0 < max(moved) < 5e-3  # of the 1e-2 that ten steps can move
    other = optimizer_of(exact)
    for p in exact:
        load_moments(other, p, adamw.state[p])
        found = moments_of(other.state[p])
        for moment in ("exp_avg", "exp_avg_sq"):
            kept = adamw.state[p][moment]
            assert (found[moment] - kept).norm() < 0.02 * kept.norm()
        assert found["step"] == 10


def test_paged_optimizer_is_refused_without_cuda():
    with pytest.raises(UserError, match="paged_adamw8bit needs a CUDA device, this one is cpu"):
        adamw8bit([{"params": parameters()}], "paged_adamw8bit", (0.9, 0.95), 1e-8)
