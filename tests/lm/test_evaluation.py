"""Long texts whole and in chunks: every number is of what was read, the memory is that of a chunk."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from generation_cases import VOCAB, build
from tiny import byte_tokenizer
from torch.profiler import ProfilerActivity, profile

from rwkvinside.errors import UserError
from rwkvinside.lm.evaluation import by_position, evaluate_documents, evaluate_sequence_modeling, help_texts
from rwkvinside.lm.session import StatefulModel
from rwkvinside.support.process_memory import forget_peak


def documents(*lengths):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (length,), generator=draw) for length in lengths]


@pytest.fixture(scope="module")
def model():
    return build(dtype=torch.float32)


@pytest.fixture(scope="module")
def found(model):
    return evaluate_documents(model, documents(40, 90, 64), 32)


def losses(model, ids, sizes):
    """Cross-entropies of a document whose parts are read alone, by the model itself."""
    with torch.no_grad():
        logits = torch.cat([model(part[None], use_cache=False).logits[0] for part in ids[:-1].split(sizes)])
    return F.cross_entropy(logits, ids[1:], reduction="none")


def test_perplexities_are_those_of_the_model(model, found):
    given = documents(40, 90, 64)
    whole = [losses(model, ids, 1000) for ids in given]
    alone = [losses(model, ids, 32) for ids in given]

    def ppl(parts, first=0):
        return torch.cat([x[first:] for x in parts]).mean().exp().item()

    for name in ("perplexity", "full_processing_perplexity"):
        assert found[name] == pytest.approx(ppl(whole), rel=1e-4)
    assert found["with_state_perplexity"] == pytest.approx(ppl(whole, 32), rel=1e-4)
    assert found["without_state_perplexity"] == pytest.approx(ppl(alone, 32), rel=1e-4)
    assert found["state_benefit_ratio"] == found["without_state_perplexity"] / found["with_state_perplexity"] != 1
    by_length = sorted(whole, key=len, reverse=True)
    assert [row["tokens"] for row in found["sequence_results"]] == [90, 64, 40]
    for row, expected in zip(found["sequence_results"], by_length, strict=True):
        assert row["perplexity"] == pytest.approx(ppl([expected]), rel=1e-4) and row["latency_ms"] > 0


def test_chunk_sizes_agree_and_ratios_are_of_what_was_measured(found):
    ways = found["chunked_processing_results"]
    assert [way["chunk_size"] for way in ways] == [32, 64] and (found["documents"], found["tokens"]) == (3, 194)
    for way in ways:
        assert way["perplexity"] == pytest.approx(found["full_processing_perplexity"], rel=1e-4)
        assert way["speed_ratio"] == found["full_processing_latency_ms"] / way["latency_ms"]
    assert found["latency_ms"] == ways[0]["latency_ms"]


def test_positions(found):
    assert [(b["first"], b["last"], b["tokens"]) for b in found["by_position"]] == [
        *((1, 1, 3), (2, 3, 6), (4, 7, 12), (8, 15, 24), (16, 31, 48)),
        *((32, 63, 8 + 32 + 32), (64, 89, 26)),
    ]
    mean = sum(b["tokens"] * b["ce"] for b in found["by_position"]) / 191
    assert math.exp(mean) == pytest.approx(found["perplexity"], rel=1e-6)
    counted = by_position([torch.arange(1.0, 8.0)])
    assert [bucket["ce"] for bucket in counted] == [1.0, 2.5, 5.5]


def test_the_call_of_the_founding_document():
    tokenizer = byte_tokenizer()
    model = StatefulModel(_with_vocabulary(len(tokenizer)))
    results = evaluate_sequence_modeling(model=model, tokenizer=tokenizer, chunk_size=32)
    assert (results["documents"], results["tokens"]) == (4, 4 * 4 * 32)
    assert results["perplexity"] == pytest.approx(results["full_processing_perplexity"], rel=1e-4)
    assert min(map(len, help_texts(4))) > 20_000 and "import" in help_texts(4)[0]


def _with_vocabulary(size):
    model = build(dtype=torch.float32)
    model.resize_token_embeddings(size)
    return model.eval()


def test_without_a_border_there_is_nothing_to_carry(model):
    with pytest.raises(UserError, match="no document is longer than a chunk of 32 tokens, the longest has 33"):
        evaluate_documents(model, documents(20, 33), 32)


@pytest.fixture(scope="module")
def wide():
    """Logits of a token take 32 KiB, much more than anything else."""
    torch.manual_seed(0)
    model = StatefulModel(_with_vocabulary(8192)).requires_grad_(True)
    return model, torch.randint(3, 8192, (1, 512), generator=torch.Generator().manual_seed(0))


def allocated(work):
    """The most bytes that PyTorch has allocated at once: exact, where pages in RAM depend on glibc and the system."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("gradient, kept", [(False, 0), (True, 0.15)])
def test_the_memory_of_a_loss_is_that_of_a_chunk(wide, gradient, kept):
    """With gradient, those of all parameters are kept beside it."""
    model, ids = wide
    peaks = {}
    for size in (32, 128, 512):
        model.set_chunk_size(size)
        with torch.set_grad_enabled(gradient):
            peaks[size] = allocated(lambda: model.forward_chunked(ids, ids))
    logits = 512 * 8192 * 4
    assert peaks[512] > 2 * logits  # they, and their log-softmax
    assert peaks[128] < (0.3 + kept) * peaks[512] and peaks[32] < (0.1 + kept) * peaks[512], peaks


def test_memory_ratios_are_measured(wide):
    if not forget_peak():
        pytest.skip("this system does not count a peak of memory anew")
    model, ids = wide
    found = evaluate_documents(model, [ids[0]], 128)
    ratios = {way["chunk_size"]: way["memory_ratio"] for way in found["chunked_processing_results"]}
    assert list(ratios) == [32, 128, 256] and ratios[32] < 0.7 and ratios[32] < ratios[256], ratios
