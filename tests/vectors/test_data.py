import pytest
import torch
import torch.nn.functional as F

from rwkvinside.errors import UserError
from rwkvinside.vectors.baselines import NAMES, baseline, best_recent_mean, evaluate_baselines, weighted_by_age
from rwkvinside.vectors.data import VectorData, WindowRows, load_data, shuffled_codes, split
from rwkvinside.vectors.metrics import cosines, predict, score
from rwkvinside.vectors.settings import DataConfig

CONTEXT = 3


def numbered(lengths=(6, 3, 9, 5, 7)):
    """Documents whose vectors say which document and place they are."""
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    places = torch.cat([torch.arange(length) for length in lengths])
    vectors = torch.stack([documents + 1.0, places + 1.0, torch.sin(17.0 * documents + places)], 1)
    texts = [f"{a}.{b}" for a, b in zip(documents.tolist(), places.tolist(), strict=True)]
    return VectorData(vectors, documents, texts, documents.clone(), {"space": "numbers", "dim": 3})


def small_split(**more):
    return split(numbered(), DataConfig(source="numbers", context=CONTEXT, val=0.4, **more))


def test_windows_stay_within_their_document():
    both = small_split()
    assert len(both.train) + len(both.val) == 3 + 0 + 6 + 2 + 4
    for windows in (both.train, both.val):
        batch = windows.batch(torch.arange(len(windows)))
        assert (batch.x[..., 0] == batch.x[:, :1, 0]).all() and (batch.y[..., 0] == batch.x[..., 0]).all()
        assert torch.equal(batch.y[:, :-1], batch.x[:, 1:])
        assert torch.equal(batch.y[..., 1], batch.x[..., 1] + 1)
    documents = [set(windows.data.documents[windows.starts].tolist()) for windows in (both.train, both.val)]
    assert not documents[0] & documents[1] and all(documents)


def test_limits_and_what_is_too_short():
    assert len(small_split(limit=4).train) == 4
    with pytest.raises(UserError, match=r"0 windows of 30 \+ 1 vectors"):
        split(numbered(), DataConfig(source="numbers", context=30))


def test_rows_are_a_function_of_seed_and_number():
    both = small_split()
    rows, again = WindowRows(both.train, 3), WindowRows(both.train, 3)
    count = len(both.train)
    forward = [rows.batch([i]).x for i in range(2 * count)]
    for i in reversed(range(2 * count)):
        assert torch.equal(again.batch([i]).x, forward[i])
    epochs = [torch.cat(forward[:count]), torch.cat(forward[count:])]
    assert not torch.equal(*epochs)
    assert sorted(epochs[0].flatten(1).tolist()) == sorted(epochs[1].flatten(1).tolist())


def test_reversed_documents():
    data = numbered()
    back = data.reversed()
    assert torch.equal(back.documents, data.documents)
    for number in range(5):
        own = data.documents == number
        assert torch.equal(back.vectors[own], data.vectors[own].flip(0))
    assert back.texts[:6] == ["0.5", "0.4", "0.3", "0.2", "0.1", "0.0"]


def test_shuffled_codes_are_those_of_other_documents():
    codes = shuffled_codes(numbered()).codes
    assert sorted(codes.unique().tolist()) == [0, 1, 2, 3, 4] and not torch.equal(codes, numbered().codes)


def test_scores_are_their_definitions():
    both = small_split()
    target = both.val.data.vectors[both.val.targets]
    perfect = score(target.clone(), both.val, cosines(-target, both.val))
    assert perfect["cosine"] == pytest.approx(1) and perfect["mse"] == pytest.approx(0, abs=1e-6)
    assert perfect["gain"] == pytest.approx(2) and perfect["r1"] == perfect["mrr"] == perfect["decode"] == 1
    worst = score(-target, both.val)
    assert worst["cosine"] == pytest.approx(-1) and worst["mse"] == pytest.approx(4, abs=1e-5) and worst["ca"] == 0
    assert worst["cosine_low"] == pytest.approx(-1) == worst["cosine_high"]


def test_of_one_document_there_is_nothing_to_contrast():
    """Neither vectors of other documents nor an interval over documents: no number, in place of 0 and no width."""
    data = numbered([9, 9])
    both = split(data, DataConfig(source="numbers", context=CONTEXT, val=0.5))
    target = data.vectors[both.val.targets]
    numbers = score(target, both.val, cosines(target, both.val))
    assert numbers["cosine"] == pytest.approx(1) and numbers["gain"] == pytest.approx(0)
    assert not {"ca", "cosine_low", "cosine_high", "gain_low", "gain_high"} & set(numbers)


def test_interval_covers_documents():
    """Windows of a document are alike: the interval is as wide as that of so many documents."""
    lengths = [20] * 40
    data = numbered(lengths)
    both = split(data, DataConfig(source="numbers", context=CONTEXT, val=0.9))
    sign = torch.where(data.documents[both.val.targets] % 2 == 0, 1.0, -1.0)
    numbers = score(sign[:, None] * data.vectors[both.val.targets], both.val)
    assert 0.4 < numbers["cosine_high"] - numbers["cosine_low"] < 1  # 4 / sqrt(36); of independent windows 0.16


@pytest.fixture(scope="module")
def rotor():
    settings = DataConfig(source="synthetic:rotor-lin", limit=500)
    return split(load_data(settings), settings)


def test_baselines(rotor):
    found = dict(evaluate_baselines(rotor, tuple(name for name in NAMES if name != "mlp")))
    assert abs(found["random"]["cosine"]) < 0.01
    assert found["linear"]["cosine"] > 0.95  # four rotations of 16 dimensions have a common linear rule over 5 vectors
    assert found["nn"]["cosine"] < found["oracle_nn"]["cosine"] < 0.9
    last = predict(baseline("copy_last", rotor.train), rotor.val)
    at = rotor.val.targets
    expected = F.cosine_similarity(rotor.val.data.vectors[at - 1], rotor.val.data.vectors[at], dim=-1)
    assert found["copy_last"]["cosine"] == pytest.approx(float(expected.mean()), abs=1e-5)
    torch.testing.assert_close(last, rotor.val.data.vectors[at - 1])


def test_recent_mean_is_fitted():
    """Targets are a mean that forgets, and something constant."""
    x = torch.randn(300, 4, 8, generator=torch.Generator().manual_seed(0))
    constant = F.one_hot(torch.tensor(0), 8).float()
    target = weighted_by_age(x, 0.6) + 0.5 * constant
    factor, shift = best_recent_mean(x, target)
    assert factor == 0.6
    torch.testing.assert_close(shift, 1.0 * target.mean(0))
    torch.testing.assert_close(weighted_by_age(x, 1.0), x.mean(1))


def test_synthetic_names():
    with pytest.raises(UserError, match="did you mean rotor-tanh"):
        load_data(DataConfig(source="synthetic:rotor-tan"))
    assert load_data(DataConfig(source="synthetic:rotor-tmd")).codes is not None
