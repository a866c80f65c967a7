"""evaluate_models against a loop that takes one document and one token at a time, in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rwkvinside.data.batch import Batch
from rwkvinside.data.rows import PaddedDocuments, document_batches
from rwkvinside.data.token_store import TokenStore
from rwkvinside.errors import UserError
from rwkvinside.evaluate.quality import evaluate_models, token_scores


def llama(vocab: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,  # the usual 0.02 gives nearly uniform predictions, on which any formula looks right
    )
    return LlamaForCausalLM(config).eval()


def gpt2(vocab: int) -> GPT2LMHeadModel:
    torch.manual_seed(2)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=vocab, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3, bos_token_id=0)
    ).eval()


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 17, 2, 1, 33, 8, 8, 21)
    return [torch.randint(0, 40, (n,), generator=generator).tolist() for n in lengths]


def padded(documents: list[list[int]], max_length: int) -> PaddedDocuments:
    ids = np.concatenate([np.array(ids, dtype=np.uint32) for ids in documents])
    count = len(documents)
    store = TokenStore(
        tokens=ids,
        offsets=np.cumsum([0, *map(len, documents)]),
        hashes=np.zeros(count, dtype=np.uint64),
        loss=None,
        selected=np.arange(count),
        fingerprint="",
        max_id=int(ids.max()),
    )
    return PaddedDocuments(store, max_length)


def batches(documents: list[list[int]], max_length: int = 64, batch_tokens: int = 8192) -> list[Batch]:
    return list(document_batches(padded(documents, max_length), batch_tokens=batch_tokens))


def by_hand(student, teacher, documents, vocab: int, max_length: int) -> dict[int, list[list[float]]]:
    """Context length -> [KL, CE, CE of the teacher, agreement] of every prediction."""
    found: dict[int, list[list[float]]] = {}
    for ids in documents:
        for t in range(min(len(ids) - 1, max_length)):
            x = torch.tensor([ids[: t + 1]])
            with torch.no_grad():
                q = student(x).logits[0, -1, :vocab].double().softmax(-1)
                p = teacher(x).logits[0, -1, :vocab].double().softmax(-1)
            kl = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
            target = ids[t + 1]
            agree = float(q.argmax() == p.argmax())
            found.setdefault(t + 1, []).append([kl, -math.log(q[target]), -math.log(p[target]), agree])
    return found


def mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_equals_one_document_and_one_token_at_a_time(documents, batch_tokens):
    student, teacher = llama(48, 0), gpt2(40)  # other family, padded vocabulary
    expected = by_hand(student, teacher, documents, vocab=40, max_length=24)
    seen = []
    found = evaluate_models(student, teacher, batches(documents, 24, batch_tokens), progress=seen.append)

    assert found.documents == sum(seen) == 7  # the document of one token predicts nothing
    assert found.shared_vocab == 40
    rows = [row for bucket in expected.values() for row in bucket]
    assert found.scores.tokens == len(rows)
    scores = found.scores
    # fp32 softmax over 40 ids: errors of about 1e-6 per token
    assert [scores.kl, scores.ce, scores.ce_teacher, scores.agreement] == pytest.approx(mean(rows), abs=2e-6)
    assert scores.perplexity == pytest.approx(math.exp(scores.ce))

    assert [(b.first, b.last) for b in found.by_position] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 24)]
    for bucket in found.by_position:
        rows = [row for t in range(bucket.first, bucket.last + 1) for row in expected[t]]
        assert bucket.scores.tokens == len(rows)
        assert [bucket.scores.kl, bucket.scores.ce] == pytest.approx(mean(rows)[:2], abs=2e-6)


def test_same_model_has_no_divergence_and_agrees(documents):
    model = llama(40, 0)
    found = evaluate_models(model, model, batches(documents)).scores
    assert found.kl == 0
    assert found.agreement == 1
    assert found.ce == found.ce_teacher


def test_training_mode_is_given_back(documents):
    student, teacher = llama(40, 0).train(), llama(40, 1)
    evaluate_models(student, teacher, batches(documents))
    assert student.training and not teacher.training


def test_masked_labels_are_not_evaluated(documents):
    student, teacher = llama(40, 0), llama(40, 1)
    (batch,) = batches(documents[4:5])
    labels = batch.labels.clone()
    labels[:, :20] = -100
    found = evaluate_models(student, teacher, [replace(batch, labels=labels)])
    whole = evaluate_models(student, teacher, [batch])
    assert found.scores.tokens == 12 and whole.scores.tokens == 32
    assert found.by_position[-1].scores == whole.by_position[-1].scores  # the predictions after 32 tokens


def test_an_id_that_the_teacher_forbids_adds_nothing():
    teacher = torch.tensor([[0.0, 0.0, -math.inf]])
    student = torch.tensor([[0.0, 0.0, 0.0]])
    kl = token_scores(student, teacher, torch.tensor([0]))[0]
    assert kl.item() == pytest.approx(math.log(1.5), abs=1e-6)


def test_bf16_logits_are_summed_in_fp32():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5000).bfloat16()
    labels = torch.tensor([1, 2, 3])
    exact = token_scores(student.double().float(), teacher.double().float(), labels)
    assert torch.equal(token_scores(student, teacher, labels), exact)


def test_a_label_outside_the_shared_ids_names_both_sizes(documents):
    with pytest.raises(UserError, match=r"student 48, teacher 30"):
        evaluate_models(llama(48, 0), llama(30, 0), batches([[1, 2, 35]]))


def test_nothing_to_judge():
    model = llama(40, 0)
    with pytest.raises(UserError, match="no token to predict"):
        evaluate_models(model, model, batches([[1], [2]]))


def test_two_documents_in_a_row_are_refused():
    ids = torch.zeros(1, 4, dtype=torch.int64)
    batch = Batch(ids, ids, ids, torch.tensor([[1, 1, 2, 2]], dtype=torch.int32), rows=(0,))
    with pytest.raises(ValueError, match="more than one document"):
        evaluate_models(llama(40, 0), llama(40, 0), [batch])


def test_batches_stay_within_their_budget_and_lose_nothing(documents):
    made = batches(documents, batch_tokens=40)
    assert all(batch.input_ids.numel() <= 40 for batch in made)
    rows = [pair for b in made for pair in zip(b.input_ids, b.mask.sum(1), strict=True)]
    assert sorted(row[: int(length)].tolist() for row, length in rows) == sorted(documents)
    lengths = [int(length) for _, length in rows]
    assert lengths == sorted(lengths, reverse=True)  # alike lengths share a batch
