"""Scores of layers on a student of which one mixer is spoiled, and of which one is worth more than the others."""

import pytest
import torch
from hybrid_cases import packed, teacher

from rwkvinside.hybrid.layouts import LayerChoice
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.layer_choice.scores import forwards, measure
from rwkvinside.losses.distillation import DistillationLoss
from rwkvinside.teacher.signals import SelfTeacher

LAYERS, SPOILED = 4, 2


def recall():
    """Rows for swap; any labels are as good here."""
    return packed([12], rows=2, seed=9)


@pytest.fixture(scope="module")
def model():
    """Mixers that equal their attention, but for some noise in all and much in one."""
    student = HybridModel.from_teacher(teacher(layers=LAYERS), StudentConfig(window=64)).eval()
    torch.manual_seed(1)
    for i, mixer in student.mixers.items():
        mixer.mix_recurrence.data.zero_()
        mixer.mix_window.data.fill_(1)
        mixer.output.weight.data += (0.3 if i == SPOILED else 0.02) * torch.randn_like(mixer.output.weight)
    return student


@pytest.fixture
def batches():
    return [packed([30, 20], rows=2, seed=seed) for seed in range(4)]


@pytest.mark.parametrize("method", ["error", "restore", "swap", "greedy"])
def test_the_layer_that_lost_most_is_chosen(model, batches, method):
    choice, calls = LayerChoice(method, 1), []
    scores = measure(model, batches, choice, recall, lambda: calls.append(1))
    assert scores.select(choice) == (SPOILED,) and len(scores.layers) == LAYERS
    assert ("the teacher itself recalls" in scores.warning) == (method == "swap"), "it was never trained"
    assert scores.method == method and scores.serves(choice) and not scores.serves(LayerChoice("uniform", 1))
    assert 0 < len(calls) <= forwards(choice, LAYERS, len(batches))


def test_restore_is_the_divergence_that_a_layer_saves(model, batches):
    def divergence(kept):
        total = sum(
            float(
                model(b, task=DistillationLoss(SelfTeacher().signal(model, b)), layers=dict.fromkeys(kept, "kept"))[0]
            )
            for b in batches[:2]
        )
        return total / sum(b.num_targets for b in batches[:2])

    scores = measure(model, batches, LayerChoice("restore", 1), recall, lambda: None)
    assert scores.tokens == sum(b.num_targets for b in batches[:2]), "the same layer on twice the text: enough"
    assert scores.base == pytest.approx(divergence(()), rel=1e-5)
    for i in range(LAYERS):
        assert scores.layers[i] == pytest.approx(divergence(()) - divergence((i,)), rel=1e-4, abs=1e-6)
    greedy = measure(model, batches[:2], LayerChoice("greedy", 2, max_run=1), recall, lambda: None)
    assert greedy.order[0] == SPOILED and abs(greedy.order[0] - greedy.order[1]) > 1
    kl = divergence(tuple(greedy.order))
    assert min(divergence((SPOILED, i)) for i in (0,)) >= kl - 1e-6
    assert greedy.details["kl"][greedy.order[1]] == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize(
    "kl, rounds, chosen",
    [
        ({0: [4, 1, 3, 2], 1: [4, 1, 3, 2], 2: [4, 2, 3, 1]}, 3, (1, 3)),  # 1 and 3 each time
        ({0: [4, 1, 3, 2], 1: [1, 4, 3, 2], 2: [1, 4, 3, 2], 4: [1, 4, 3, 2]}, 4, (0, 3)),  # changed once
        (
            {0: [1, 2, 3, 4], 1: [2, 1, 4, 3], 2: [4, 1, 2, 3], 4: [4, 1, 2, 3], 8: [4, 1, 3, 2]},
            5,
            (1, 3),
        ),  # at the end
    ],
)
def test_short_distillations_end_when_they_agree(model, batches, kl, rounds, chosen):
    choice, asked = LayerChoice("restore", 2, distill=8), []

    def trials(candidates, tokens, score):
        asked.append(tokens)
        assert candidates == [(), (0,), (1,), (2,), (3,)]
        return [9 - tokens, *kl[tokens]]

    scores = measure(model, batches[:1], choice, recall, lambda: None, trials)
    last = sorted(kl)[rounds - 1]
    assert asked == sorted(kl)[:rounds]
    assert scores.select(choice) == chosen and scores.base == 9 - last
    assert scores.layers == [9 - last - value for value in kl[last]]
    assert scores.details == {f"kl@{n}": kl[n] for n in sorted(kl)[:rounds]}
    assert scores.method == "restore+distill" and scores.serves(choice)
    assert not scores.serves(LayerChoice("restore", 2)) and not scores.serves(LayerChoice("restore", 2, distill=16))


def test_short_distillations_score_what_restore_does(model, batches):
    def trials(candidates, tokens, score):
        return [score(kept) for kept in candidates]

    choice, calls = LayerChoice("restore", 1, distill=8), []
    untrained = measure(model, batches, choice, recall, lambda: calls.append(1), trials)
    assert 0 < len(calls) <= forwards(choice, LAYERS, len(batches))
    plain = measure(model, batches, LayerChoice("greedy", 1), recall, lambda: None)  # restore stops earlier
    assert untrained.base == pytest.approx(plain.base, rel=1e-6)
    assert untrained.details["kl@0"] == pytest.approx(plain.details["kl"], rel=1e-6)


def test_greedy_scores_serve_their_own_choice_only(model, batches):
    choice = LayerChoice("greedy", 2)
    scores = measure(model, batches[:1], choice, recall, lambda: None)
    assert scores.serves(choice) and not scores.serves(LayerChoice("greedy", 1))
    assert scores.select(choice) == tuple(sorted(scores.order))
