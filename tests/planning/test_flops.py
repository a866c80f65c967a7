"""Operations by formula against what PyTorch counts while it computes."""

from functools import partial

import hybrid_cases
import pytest
import torch
from plans import layer_spec, stage_plan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rwkvinside.data.batch import Batch
from rwkvinside.hybrid.assemble import apply
from rwkvinside.hybrid.lm_head import Logits
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import AdapterConfig, StudentConfig
from rwkvinside.modeling import time_mixer
from rwkvinside.planning import devices
from rwkvinside.planning.devices import measured_flops, peak_flops
from rwkvinside.planning.fit_flops import calibration_flops
from rwkvinside.planning.flops import training_flops
from rwkvinside.support.progress import Progress
from rwkvinside.teacher.kinds import TeacherKind

ROWS, LENGTH = 2, 32
SIZES = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=48,
    vocab_size=50,
    tie_word_embeddings=False,
)


def teacher(layers=3):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | {"num_hidden_layers": layers})).eval()


def hybrid(train, kept=(), preset="cxa079", layers=None, **fields):
    model = teacher() if preset != "x070" else LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    student = HybridModel.from_teacher(model, StudentConfig(preset=preset, attention_layers=kept, **fields))
    if layers is not None:
        apply(student, layers)
    student.set_trainable(train)
    return student


def stage(objective):
    values = {
        "objective": objective,
        "tokens": 1000,
        "train": ["mixer"],
        "data": {"seq_len": LENGTH},
        "batch": {"tokens": LENGTH},
        "optim": {},
    }
    loss = {"distill": {}, "sft": {"kl": 0.0, "ce": 1.0}}
    return stage_plan(**values | ({"loss": loss[objective]} if objective in loss else {}))


def no_recurrence(r, log_decay, k, v, a, b, state=None, **options):
    # depends on all inputs, as the recurrence does, without a product of matrices
    v, a = (t.repeat_interleave(r.shape[2] // t.shape[2], 2) for t in (v, a))
    return r * log_decay.exp() * k + a * b + v, state


@pytest.fixture
def counted(monkeypatch):
    """A function that counts what a step really multiplies, per token.

    The recurrence is left out, its backends differ in what they do. Scores are counted over the whole square.
    """

    monkeypatch.setattr(time_mixer, "wkv7", no_recurrence)

    def count(student, step):
        ids = torch.randint(0, 50, (ROWS, LENGTH))
        ones = torch.ones_like(ids)
        positions = torch.arange(LENGTH).expand(ROWS, -1)
        batch = Batch(ids, ids, positions, ones.int(), tuple(range(ROWS)))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step(student, batch).backward()
        return counter.get_total_flops() / (ROWS * LENGTH)

    return count


def align(student, batch):
    return sum(error for error, _ in student(batch, mode="align").values())


def distill(student, batch, second=None):
    """A forward of each side through its head, and a loss that multiplies no matrices."""
    if second is None:
        student(batch, mode="teacher", task=Logits())
    else:
        with torch.no_grad():
            second(batch.input_ids)
    return sft(student, batch)


def sft(student, batch):
    return student(batch, mode="student", task=Logits()).logsumexp(-1).sum()


def formula(student, objective, source, teacher=None):
    found = training_flops(student, stage(objective), source, teacher)
    square = 2 * LENGTH / (LENGTH + 1)
    scores = found.forward.get("scores", 0) + found.backward.get("scores", 0)
    recurrence = found.forward["recurrence"] + found.backward["recurrence"]
    # of the teacher's operations the scores are the ones that are not whole matrices
    layers = {TeacherKind.SELF: 3 - len(kept_of(student)) if objective == "align" else 3, TeacherKind.ONLINE: 5}.get(
        source, 0
    )
    of_teacher = layers * 4 * 4 * 16 * (LENGTH + 1) / 2
    return found.total - recurrence + (square - 1) * (scores + of_teacher)


def kept_of(student):
    return [i for i in range(3) if i not in student.rwkv_layers]


@pytest.mark.parametrize(
    "train, kept",
    [(["mixer"], ()), (["mixer"], (0,)), (["mixer.lora"], (0,)), (["mixer.proj"], ()), ([r".*\.1\..*output\..*"], ())],
)
def test_align(counted, train, kept):
    student = hybrid(train, kept)
    assert formula(student, "align", TeacherKind.SELF) == pytest.approx(counted(student, align))


@pytest.mark.parametrize(
    "train, kept",
    [
        (["mixer"], (1,)),
        (["mixer"], (0, 2)),
        ([".*"], (1,)),
        (["mlp"], (0, 2)),
        (["head"], (1,)),
        (["norms"], (1,)),
        (["embed"], (1,)),
        ([r"model\.layers\.1\.mlp\..*"], (0, 2)),
        ([r".*\.w1"], (0, 2)),
        ([r".*\.receptance\.weight", "attention"], (1,)),
    ],
)
def test_distill(counted, train, kept):
    student = hybrid(train, kept)
    assert formula(student, "distill", TeacherKind.SELF) == pytest.approx(counted(student, distill))


@pytest.mark.parametrize("kind", ["lora", "miss"])
def test_adapters_on_quantized_layers(counted, kind):
    specs = (
        AdapterConfig(kind=kind, groups=["mlp", "head"], rank=4),
        AdapterConfig(groups=[r".*\.layers\.0\..*output"], rank=4),
    )
    student = hybrid(["adapters"], (1,), layers=layer_spec(("mlp", "attention", "teacher"), adapters=specs))
    found = training_flops(student, stage("distill"), TeacherKind.SELF)
    assert found.forward["adapters"] > 0 and found.backward["mlp"] <= found.forward["mlp"]
    assert formula(student, "distill", TeacherKind.SELF) == pytest.approx(counted(student, distill))
    student.set_trainable([r".*\.layers\.0\..*output\.lora_.*", "mixer.lora"])  # the others are off in align
    assert formula(student, "align", TeacherKind.SELF) == pytest.approx(counted(student, align))


def test_bone_needs_the_gradient_of_the_whole_weight():
    """Its small matrices change the weight itself: products that do not grow with tokens are not counted."""
    student = hybrid(
        ["adapters"], layers=layer_spec(adapters=(AdapterConfig(kind="bone", groups=["mlp", "head"], rank=2),))
    )
    found = training_flops(student, stage("sft"), None)
    entry = 2 * 2 * 32 * 48  # up and gate of the first layer, in front of which nothing trains
    assert found.backward["mlp"] == 2 * found.forward["mlp"] - entry
    assert found.backward["head"] == 2 * found.forward["head"]
    assert "adapters" not in found.forward


def test_a_second_model_is_counted_as_what_it_is(counted):
    student, second = hybrid([".*"]), teacher(layers=5)
    student.release_teacher()
    step = partial(distill, second=second)
    assert formula(student, "distill", TeacherKind.ONLINE, second) == pytest.approx(counted(student, step))
    assert formula(student, "sft", None) == pytest.approx(counted(student, sft))


@pytest.mark.parametrize("train", [["mixer"], [".*"]])
def test_experts_count_as_often_as_a_token_is_sent_through_them(counted, train):
    model = hybrid_cases.teacher("qwen3_moe", tie_word_embeddings=False)  # one of its three layers has none
    model.set_experts_implementation("eager")
    student = HybridModel.from_teacher(model, StudentConfig(attention_layers=(1,)))
    student.set_trainable(train)
    assert formula(student, "distill", TeacherKind.SELF) == pytest.approx(counted(student, distill))


def test_a_sliding_window_has_fewer_scores():
    found = {}
    for family in ("mistral", "llama"):
        lm = hybrid_cases.teacher(family, tie_word_embeddings=False)
        student = HybridModel.from_teacher(lm, StudentConfig(attention_layers=(1,)))
        student.set_trainable(["mixer"])
        found[family] = training_flops(student, stage("sft"), None).forward["scores"]
    window, pairs = 6, sum(min(t + 1, 6) for t in range(LENGTH))
    assert window < LENGTH and found["mistral"] == pytest.approx(4 * 4 * 16 * pairs / LENGTH)
    assert found["llama"] == pytest.approx(4 * 4 * 16 * (LENGTH + 1) / 2)


@pytest.mark.parametrize("shift", "wk")
def test_the_stock_mixer(counted, shift):
    student = hybrid([rf"model\.layers\.0\.self_attn\.x_{shift}"], preset="x070")
    assert formula(student, "distill", TeacherKind.SELF) == pytest.approx(counted(student, distill))


@pytest.mark.parametrize("train, objective", [(["mixer"], "align"), ([".*"], "distill"), (["norms"], "distill")])
def test_a_window(counted, train, objective):
    student = hybrid(train, (1,), window=6, sinks=2)
    found = training_flops(student, stage(objective), TeacherKind.SELF)
    keys = sum(min(t + 1, 8) for t in range(LENGTH)) / LENGTH
    assert found.forward["window"] == pytest.approx(2 * 4 * 4 * 16 * keys)
    needed = found.forward["window"] + found.backward["window"]
    # computed are all keys of the one block of 64 queries that the rows make, and the score of what lies beyond the
    # window as one more, in 8 channels more
    whole = (64 + 6 + 2 + 1) / keys * (16 + 8) / 16
    step = align if objective == "align" else distill
    expected = formula(student, objective, TeacherKind.SELF) + (whole - 1) * needed
    assert expected == pytest.approx(counted(student, step))


def test_frozen_weights_need_no_gradient_of_their_own():
    all_of_it, mixers = (training_flops(hybrid(t), stage("sft"), None) for t in ([".*"], ["mixer"]))
    assert mixers.forward == all_of_it.forward
    assert mixers.backward["mlp"] == all_of_it.backward["mlp"] / 2 == mixers.forward["mlp"]
    assert mixers.backward["recurrence"] == 2 * mixers.forward["recurrence"] == 2 * 3 * 8 * 4 * 16**2


@pytest.mark.parametrize("window", [0, 6])
def test_calibration(monkeypatch, window):
    """Products of a whole calibration, but those of the recurrence; PyTorch does not count what solves equations."""
    tokens, length = 512, 64
    monkeypatch.setattr(time_mixer, "wkv7", no_recurrence)
    student = hybrid([], (1,), window=window, sinks=2 if window else 0)
    data, rows = {"seq_len": length}, {"tokens": length}
    plan = stage_plan(objective="calibrate", tokens=tokens, train=[], data=data, batch=rows, optim=None)
    ids = torch.randint(0, 50, (tokens // length, length))
    ones, positions = torch.ones_like(ids).int(), torch.arange(length).expand(*ids.shape)
    batch = Batch(ids, ids, positions, ones, tuple(range(len(ids))))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        plan.stage.fit(student, [batch], Progress("fit"))
    found = calibration_flops(student, plan)
    assert ("shares" in found) == bool(window)
    computed = sum(found.values()) - found["recurrence"] - found["solving"]
    # more is computed than is needed: scores of the whole square, and all keys of a window's blocks
    assert counter.get_total_flops() * (0.6 if window else 0.9) < computed < counter.get_total_flops()


def test_how_long_a_calibration_takes(monkeypatch):
    assert devices.expected_time(3e12, "cpu") == "about 60 s of one core at 50 GFLOP/s"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.expected_time(67e13, "cuda") == "about 20 s at half the fp32 peak of an H100 (an estimate)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A100-SXM4-80GB")
    assert "half the fp32 peak of NVIDIA A100" in devices.expected_time(67e13, "cuda")
    assert devices.expected_time(19.5e13, "cuda", "A100") == "about 20 s at half the fp32 peak of A100 (an estimate)"


def test_peak_by_name(monkeypatch):
    def peak(name, precision):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return peak_flops(torch.device("cuda"), precision)

    assert peak("NVIDIA H100 80GB HBM3", "bf16") == (989e12, "data sheet")
    assert peak("NVIDIA H100 PCIe", "bf16") == (756e12, "data sheet")
    assert peak("NVIDIA A100-SXM4-80GB", "fp32") == (19.5e12, "data sheet")
    assert peak("NVIDIA L4", "bf16") == (121e12, "data sheet")
    monkeypatch.setattr(devices, "measured_flops", lambda device, precision: 1.0)
    assert peak("NVIDIA RTX A4000", "bf16") == (1.0, "measured")  # not an A40


def test_peak_of_a_cpu_is_measured():
    # a core does more than one product a nanosecond, no machine a hundred thousand
    assert 1e9 < measured_flops(torch.device("cpu"), "fp32", seconds=0.02) < 1e14


@pytest.mark.parametrize("train", [[".*"], ["mixer"]])
def test_kept_attention_that_is_cut(counted, train):
    student = hybrid(train, (0, 2), attention_window=6, attention_sinks=2)
    found = training_flops(student, stage("sft"), None)
    keys = sum(min(t + 1, 8) for t in range(LENGTH)) / LENGTH
    assert found.forward["scores"] == pytest.approx(2 * 4 * 4 * 16 * keys)
    needed = found.forward["scores"] + found.backward["scores"]
    whole = (64 + 6 + 2) / keys  # computed are all keys of the one block of 64 queries that the rows make
    recurrence = found.forward["recurrence"] + found.backward["recurrence"]
    assert found.total - recurrence + (whole - 1) * needed == pytest.approx(counted(student, sft))
    teacher = training_flops(student, stage("distill"), TeacherKind.SELF).forward["teacher"]
    full = hybrid(train, (0, 2))
    assert teacher == training_flops(full, stage("distill"), TeacherKind.SELF).forward["teacher"]


def test_adapters_of_experts_are_those_of_the_chosen_ones():
    model = hybrid_cases.teacher("qwen3_moe", 1, tie_word_embeddings=False)
    student = HybridModel.from_teacher(model, StudentConfig())
    plain = training_flops(student, stage("distill"), TeacherKind.SELF)
    apply(student, layer_spec(("mlp",), adapters=(AdapterConfig(groups=["mlp"], rank=3),)))
    student.set_trainable(["adapters"])
    found = training_flops(student, stage("distill"), TeacherKind.SELF)
    D, inner, chosen = 32, 24, 2
    weights = chosen * 3 * (D + 2 * inner + inner + D)  # A and B of gate and up in one, and of down
    assert found.forward["adapters"] == 2 * weights
    # for their weights, and for the inputs of all but the first A, whose input is the layer's
    assert found.backward["adapters"] == 2 * weights + 2 * (weights - chosen * 3 * D)
    assert found.forward["mlp"] == plain.forward["mlp"] and found.forward["teacher"] == plain.forward["teacher"]
