"""VFirstHolder: right within a rank, across ranks, and across pipeline stages."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rwkvinside.modeling.first_layer import FirstLayerKV, VFirstHolder


def first(rank, grad=False):
    g = torch.Generator().manual_seed(rank)
    return FirstLayerKV(*(torch.randn(2, 5, 3, 4, generator=g).requires_grad_(grad) for _ in range(2)))


def _rank(rank, world, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    try:
        holder = VFirstHolder()
        holder.write(first(rank))
        whole = holder.gather()
        for r in range(world):  # the logical tensor: (world_size, batch, seq, kv width), slice r written by rank r
            for got, own in zip(whole, first(r), strict=True):
                assert got.shape == (world, 2, 5, 12) and torch.equal(got[r], own.flatten(2))
        assert torch.equal(holder.read().v, first(rank).v)  # gathering leaves the rank's own slice alone
        holder.broadcast(src=1)
        assert torch.equal(holder.read().v, first(1).v) and torch.equal(holder.read().k, first(1).k)
        if rank == 0:  # a pipeline of two stages: tensors and gradients cross the ranks
            sent = VFirstHolder()
            leaf = first(0, grad=True)
            sent.write(leaf)
            for t in sent.to_tensors():
                dist.send(t.detach(), 1)
            gradients = [torch.empty_like(t) for t in sent.to_tensors()]
            for g in gradients:
                dist.recv(g, 1)
            torch.autograd.backward(sent.to_tensors(), gradients)
            assert torch.equal(leaf.v.grad, 2 * leaf.v.detach()) and torch.equal(leaf.k.grad, torch.ones_like(leaf.k))
        else:
            tensors = tuple(torch.empty(2, 5, 3, 4) for _ in range(2))
            for t in tensors:
                dist.recv(t, 0)
            received = VFirstHolder.from_tensors(tuple(t.requires_grad_() for t in tensors)).read()
            (received.v.square().sum() + received.k.sum()).backward()
            for t in tensors:
                dist.send(t.grad, 0)
    finally:
        dist.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks(tmp_path):
    mp.spawn(_rank, (2, tmp_path / "store"), nprocs=2)


def test_one_process():
    holder = VFirstHolder()
    with pytest.raises(RuntimeError, match="before the first RWKV layer"):
        holder.read()
    value = first(0, grad=True)
    holder.write(value)
    assert holder.read().v is value.v  # no copy: gradients go to the first layer
    assert holder.gather().k.shape == (1, 2, 5, 12)
    holder.write(FirstLayerKV(value.v, None))
    assert len(holder.to_tensors()) == 1 and holder.gather().k is None
    assert VFirstHolder.from_tensors(holder.to_tensors()).read().k is None
