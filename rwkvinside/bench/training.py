"""Training speed of the stages compared with plain fine-tuning of the same teacher, on one machine and batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from ..data.batch import Batch
from ..errors import UserError
from ..hybrid.calibration import teacher_norms
from ..hybrid.model import HybridModel
from ..hybrid.settings import StudentConfig
from ..modeling.wkv7 import BACKENDS
from ..stages.steps import AlignStep, DistillStep
from ..teacher.signals import OnlineTeacher, TeacherModel
from .shapes import qwen3_shape

NOTHING = "nothing"


def training_speed(
    load_teacher: Callable[[], nn.Module],
    *,
    rows: int,
    seq_len: int,
    repeats: int,
    backends: Sequence[str],
    recomputed: Sequence[str] = (NOTHING,),
    seed: int = 0,
) -> dict:
    """Measure the speed of optimizer steps (forward, backward, clip, AdamW).

    Runs in fp32 on the CPU or the first GPU.

    Args:
        load_teacher: makes a new causal language model in fp32, each time with the same weights.
        rows, seq_len: size of the batch of random tokens, one document per row.
        repeats: steps of each kind; they take turns, so that other load on the machine affects all alike.
        backends: of the recurrence, see `wkv7`; align and distill are measured with each.
        recomputed: "nothing", "recurrence" or "layers" (in align: mixers) in the backward; each is measured, too.
        seed: of the tokens.

    Returns:
        {"tokens_per_second": {"finetune", "align BACKEND", "distill BACKEND": median}, "rows", "seq_len", "device",
        "threads"}; what is computed again stands behind the name.

    Raises:
        UserError: an unknown backend.
    """
    for backend in backends:
        if backend not in BACKENDS:
            raise UserError(f"backend {backend!r} is not known", f"allowed: {', '.join(BACKENDS)}")
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load() -> nn.Module:
        return load_teacher().to(device)

    plain = load()
    ids = torch.randint(0, plain.config.vocab_size, (rows, seq_len))
    labels = torch.cat([ids[:, 1:], torch.full((rows, 1), -100)], 1)
    positions = torch.arange(seq_len).expand(rows, -1)
    batch = Batch(ids, labels, positions, torch.ones_like(ids, dtype=torch.int32), tuple(range(rows))).to(device)

    kinds = {"finetune": _stepper(plain, lambda: plain(input_ids=batch.input_ids, labels=batch.input_ids).loss)}
    for backend in backends:
        kinds |= _conversion_steps(load, batch, backend, recomputed)
    speed = {name: rows * seq_len / seconds for name, seconds in _median_seconds(kinds, repeats, device).items()}
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    batch_and_machine = {"rows": rows, "seq_len": seq_len, "device": where, "threads": torch.get_num_threads()}
    return {"tokens_per_second": speed} | batch_and_machine


def _conversion_steps(
    load: Callable[[], nn.Module], batch: Batch, backend: str, recomputed: Sequence[str]
) -> dict[str, Callable[[], None]]:
    """Return steps of align and of distill by their names."""
    spec = StudentConfig(backend=backend)
    aligned = HybridModel.from_teacher(load(), spec).to(batch.input_ids.device)
    align = AlignStep(teacher_norms(aligned, [batch])[0])
    aligned.set_trainable(["mixer"])
    distilled = HybridModel.from_teacher(load(), spec).to(batch.input_ids.device)
    distilled.set_trainable(["mixer", "mlp", "norms", "embed", "head"])
    distilled.release_teacher()
    distill = DistillStep(OnlineTeacher(TeacherModel(load())))
    steps = {}
    for name in recomputed:
        more, what = ("", None) if name == NOTHING else (f", {name} again", name)
        of_align = "mixers" if what == "layers" else what
        one = partial(_loss, align, aligned, of_align, batch, batch.num_tokens)
        other = partial(_loss, distill, distilled, what, batch, batch.num_targets)
        steps[f"align {backend}{more}"] = _stepper(aligned, one)
        steps[f"distill {backend}{more}"] = _stepper(distilled, other)
    return steps


def _median_seconds(steps: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each step; the steps take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _loss(
    step: AlignStep | DistillStep, model: HybridModel, recomputed: str | None, batch: Batch, count: int
) -> torch.Tensor:
    model.recompute(recomputed)
    return step(model, batch)[0] / count


def _stepper(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)  # as the training engines do

    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def random_teacher(layers: int, heads: int, head_size: int, seed: int = 0) -> nn.Module:
    """Return a Qwen3 of this shape with random weights in fp32.

    It has half as many key/value heads, a feed-forward three times as wide as the residual stream, and 4096 token ids.
    """
    torch.manual_seed(seed)
    config = qwen3_shape(layers, heads, head_size)
    return Qwen3ForCausalLM(config)


def pretrained_teacher(path: str) -> nn.Module:
    """Load a causal language model in fp32 from a local directory or the hub."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
