"""A model that is processed by its state: chunks equal the whole, in outputs, loss and gradients."""

import pytest
import torch
import torch.nn.functional as F
from generation_cases import VOCAB, build, greedy
from torch.utils._python_dispatch import TorchDispatchMode

from rwkvinside.errors import UserError
from rwkvinside.lm.cache_parts import named_parts
from rwkvinside.lm.session import StatefulModel

WINDOW = {"window": 4, "sinks": 1}
CASES = {
    "qwen3-mixed": {},
    "all-rwkv": {"rwkv_layers": (0, 1, 2, 3)},
    "window": {"mixer": WINDOW},
    "cut-attention": {"attention_window": 6, "attention_sinks": 1},
    "llama-x070": {"family": "llama", "preset": "x070", "rwkv_layers": (1, 2)},
    "sliding": {"family": "mistral", "rwkv_layers": (0, 2), "sliding_window": 6},
}


def tokens(rows=2, length=23, seed=5):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def chunked_logits(model, ids, size):
    """As the founding document writes it."""
    chunks, found = ids.split(size, 1), []
    model.reset_state(batch_size=len(ids))
    for chunk in chunks:
        outputs, new_state = model.process_with_state(chunk, model.state)
        model.state = new_state
        found.append(outputs.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_chunks_equal_the_whole(case, dtype, tolerance):
    model = StatefulModel(build(**CASES[case], dtype=dtype))
    ids = tokens()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for size in (1, 5, 16):
            logits = chunked_logits(model, ids, size)
            torch.testing.assert_close(logits, whole, atol=tolerance, rtol=0)
            assert torch.equal(logits.argmax(-1), whole.argmax(-1))
    assert whole.argmax(-1).unique().numel() > 5


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_across_chunks_equal_the_whole(case):
    model = StatefulModel(build(**CASES[case]))
    ids = tokens()
    labels = ids.clone()
    labels[0, :7] = -100
    logits = model(ids, use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())  # transformers' own loss is fp32
    wanted = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for size, every in ((5, None), (5, 5), (64, 1)):
        model.set_chunk_size(size, detach_every=every)
        outputs = model.forward_chunked(ids, labels)
        assert abs(outputs.loss - expected) < 1e-10 and outputs.tokens == 2 * 22 - 6
        (3 * outputs.loss).backward()
        for p, gradient in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, None if gradient is None else 3 * gradient, atol=1e-9, rtol=1e-7)
            p.grad = None
    with torch.no_grad():
        model.set_chunk_size(4)
        outputs = model.forward_chunked(ids, labels)
        whole = model(ids)
    assert abs(outputs.loss - expected) < 1e-10 and not outputs.loss.requires_grad
    torch.testing.assert_close(outputs.logits, whole.logits[:, -1])
    torch.testing.assert_close(model.forward_chunked(ids).logits, whole.logits[:, -1])


def test_loss_in_fp32():
    model = StatefulModel(build(dtype=torch.float32), chunk_size=5)
    ids = tokens(length=64)
    with torch.no_grad():
        assert abs(model.forward_chunked(ids, ids).loss - model(ids, labels=ids).loss) < 1e-5


def test_truncation_cuts_the_gradient_but_not_the_loss():
    model = StatefulModel(build(), chunk_size=5)
    ids = tokens()
    found = {}
    for every in (1, 2, None):
        model.set_chunk_size(5, every)
        loss = model.forward_chunked(ids, ids).loss
        found[every] = (loss.item(), torch.autograd.grad(loss, model.model.model.layers[0].self_attn.w0)[0])
    assert len({round(loss, 10) for loss, _ in found.values()}) == 1
    assert len({round(gradient.norm().item(), 10) for _, gradient in found.values()}) == 3


def test_a_state_stays_as_it_was_and_generates():
    model = StatefulModel(build(mixer=WINDOW, rwkv_layers=(0, 2)))
    ids = tokens(rows=1)
    with torch.no_grad():
        _, state = model.process_with_state(ids[:, :16])
        before = [(name, x.clone()) for name, x in named_parts(state)]
        twice = [model.process_with_state(ids[:, 16:], state)[0].logits for _ in range(2)]
        for _ in range(3):  # single tokens are written in place
            model.process_with_state(ids[:, 16:17], state)
    assert torch.equal(*twice)
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(before, named_parts(state), strict=True))
    assert torch.equal(greedy(model.model, ids, past_key_values=state), greedy(model.model, ids))


def test_padded_rows():
    model, ids = StatefulModel(build()), tokens()
    mask = torch.ones_like(ids)
    mask[0, :8], ids[0, :8] = 0, 0
    with torch.no_grad():
        alone = model(ids[:1, 8:], use_cache=False).logits
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() counts them
        first, rest = ({"chunk": ids[:, s], "position_ids": positions[:, s]} for s in (slice(10), slice(10, None)))
        _, state = model.process_with_state(**first, attention_mask=mask[:, :10])
        outputs, _ = model.process_with_state(**rest, state=state, attention_mask=mask)
    torch.testing.assert_close(outputs.logits[:1], alone[:, 2:])


def test_what_cannot_be_processed_is_refused():
    model, ids = StatefulModel(build(dtype=torch.float32)), tokens()
    _, state = model.process_with_state(ids)
    for call, cause in (
        (lambda: model.process_with_state(ids[:1], state), "there are 1 rows of tokens and 2 of state"),
        (lambda: model.process_with_state(ids, model.state), "there are 2 rows of tokens and 1 of state"),
        (lambda: model.process_with_state(ids[:, :0]), r"shape \(2, 0\)"),
        (lambda: model.forward_chunked(ids[0], ids[0]), r"shape \(23,\)"),
        (lambda: model.forward_chunked(ids, ids[:, 1:]), r"labels have the shape \(2, 22\)"),
        (lambda: model.forward_chunked(ids, torch.full_like(ids, -100)), "no label"),
        (lambda: model.set_chunk_size(0), "chunk_size is 0"),
        (lambda: model.set_chunk_size(8, 0), "detach_every is 0"),
        (lambda: model.reset_state(0), "batch_size is 0"),
    ):
        if "1 of state" in cause:
            model.reset_state(batch_size=1)
        with pytest.raises(UserError, match=cause):
            call()
    model.model.activation_checkpointing_enable()
    model.train()
    with pytest.raises(UserError, match="gradient checkpointing"):
        model.forward_chunked(ids, ids)


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("layers", [{"rwkv_layers": (0, 1, 2, 3)}, {"rwkv_layers": (0, 2), "attention_window": 6}])
def test_reading_a_chunk_makes_nothing_of_the_length_so_far(family, layers):
    model = StatefulModel(build(family=family, **layers, dtype=torch.float32), chunk_size=512)
    largest = []
    for length in (16, 2048):
        state = model.forward_chunked(tokens(1, length)).state
        with _Largest() as found, torch.no_grad():
            model.process_with_state(tokens(1, 16), state)
        largest.append(found.elements)
    assert largest[0] == largest[1] < 16 * 2048  # of a mask
