"""A real student of two tiny layers with its teacher, its objectives and packed rows, for engines of several ranks."""

import copy
from dataclasses import replace

import hybrid_cases
import torch
from plans import layer_spec
from toy_training import callbacks
from transformers import Qwen3Config, Qwen3ForCausalLM

from rwkvinside.data.batch import IGNORE, Batch
from rwkvinside.hybrid.assemble import assemble
from rwkvinside.hybrid.calibration import teacher_norms
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import AdapterConfig, StudentConfig
from rwkvinside.losses.settings import DistillLossConfig
from rwkvinside.stages.steps import AlignStep, DistillStep
from rwkvinside.teacher.signals import OnlineTeacher, SelfTeacher, TeacherModel
from rwkvinside.training.schedule import Schedule, StageLength
from rwkvinside.training.settings import OptimConfig
from rwkvinside.training.trainer import Trainer, TrainingPlan

VOCAB, SEQ_LEN, ROWS, MICRO_ROWS, STEPS = 40, 12, 7, 3, 5  # neither two nor three ranks share seven rows evenly
LENGTH = StageLength(STEPS * ROWS * SEQ_LEN, ROWS * SEQ_LEN, SEQ_LEN)
SCHEDULE = Schedule({"mixer": 1e-3, "rest": 1e-4}, {})
SETTINGS = OptimConfig(clip=0.05)  # below the norms that occur: clipping takes part
STRUCTURE = layer_spec(
    ("mlp", "teacher", "head"),
    adapters=(
        AdapterConfig(kind="bone", rank=4, groups=["mlp"]),
        AdapterConfig(rank=2, groups=["head"], init="pissa"),
        AdapterConfig(rank=2, groups=["mixer.proj"], dora=True),
    ),
)
LOSS = DistillLossConfig(ce=0.1, chunk_tokens=8)  # several chunks a micro-batch, not equally many on every rank


class Source:
    """Row i is a function of i: two documents and a tail of padding of different lengths."""

    def batch(self, rows):
        parts = []
        for row in rows:
            draw = torch.Generator().manual_seed(1000 + row)
            ids = torch.randint(0, VOCAB, (SEQ_LEN,), generator=draw)
            first, padding = 3 + row % 4, row % 3
            segments = torch.ones(SEQ_LEN, dtype=torch.int32)
            segments[first:] = 2
            segments[SEQ_LEN - padding :] = 0
            positions = torch.cat([torch.arange(first), torch.arange(SEQ_LEN - first)])
            labels = torch.full((SEQ_LEN,), IGNORE)
            labels[:-1] = torch.where((segments[1:] == segments[:-1]) & (segments[1:] > 0), ids[1:], IGNORE)
            parts.append((ids, labels, positions, segments))
        return Batch(*map(torch.stack, zip(*parts, strict=True)), tuple(rows))


def teacher():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def student(train, lm=None):
    torch.manual_seed(1)
    model = HybridModel.from_teacher(copy.deepcopy(lm or teacher()), StudentConfig()).eval()
    model.set_trainable(train)
    return model


def groups(model):
    named = {name: p for name, p in model.canonical_parameters().items() if p.requires_grad}
    mixer = {name: p for name, p in named.items() if model.group_of(name)[0] == "mixer"}
    rest = {name: p for name, p in named.items() if name not in mixer}
    return {name: members for name, members in (("mixer", mixer), ("rest", rest)) if members}


def trainer(engine, step, micro_rows, checkpointer=None, **options):
    """Of the hybrid; `options` are those of `callbacks`."""
    plan = TrainingPlan("hybrid", LENGTH, SCHEDULE, micro_rows)
    return Trainer(engine, step, Source(), plan, checkpointer=checkpointer, callbacks=callbacks(options))


def align(checkpointing=False):
    """Return the student, and a function from what an engine made of it to the step."""
    model = student(["mixer"])
    model.recompute("mixers" if checkpointing else None)

    def step(module):
        return AlignStep(teacher_norms(module, [Source().batch(range(4))])[0])

    return model, step


def distill(checkpointing=False, shard=None):
    """Return what `align` does, with all parameters training and a second model as teacher, which `shard` may shard."""
    lm = teacher()
    model = student(["mixer", "mlp", "norms", "embed", "head"], lm)
    if checkpointing:
        model.recompute("layers")
    model_of_teacher = TeacherModel(lm)
    head = list(lm.lm_head.parameters())
    second = OnlineTeacher(model_of_teacher) if shard is None else OnlineTeacher(*shard(model_of_teacher, head))
    return model, lambda module: DistillStep(second, LOSS)


def quantized():
    """Frozen weights in nf4, the head's too, under three kinds of adapters; the student is its own teacher."""
    torch.manual_seed(1)
    model = assemble(teacher(), StudentConfig(), STRUCTURE)
    model.set_trainable(["mixer", "adapters"])
    return model, lambda module: DistillStep(SelfTeacher(), LOSS)


def sparse():
    """Experts in nf4 with LoRA, and their balance in the loss, beside a dense layer."""
    torch.manual_seed(0)
    lm = hybrid_cases.teacher("qwen3_moe", 2, vocab_size=VOCAB)
    lm.set_experts_implementation("eager")  # ranks have other numbers of tokens: sums in the same order
    lora = AdapterConfig(rank=2, groups=["mlp"])
    torch.manual_seed(1)
    model = assemble(lm, StudentConfig(), layer_spec(("mlp", "teacher"), adapters=(lora,)))
    model.set_trainable(["mixer", "adapters", r".*\.gate\.weight"])
    second = OnlineTeacher(TeacherModel(hybrid_cases.teacher("qwen3_moe", 2, vocab_size=VOCAB)))
    return model, lambda module: DistillStep(second, LOSS.model_copy(update={"router": 0.5}))


def judged():
    """Batches for evaluations: one document a row."""
    return [_one_document(Source().batch([row])) for row in range(100, 105)]


def _one_document(batch):
    labels = torch.full_like(batch.labels, IGNORE)
    labels[:, :-1] = batch.input_ids[:, 1:]
    positions = torch.arange(SEQ_LEN).expand_as(labels)
    return replace(batch, labels=labels, position_ids=positions, segment_ids=torch.ones_like(batch.segment_ids))
