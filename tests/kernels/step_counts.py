"""What an optimizer step of align and of distill dispatches, by origin. Run by test_mixer.py, or directly:

    PYTHONPATH=tests/helpers TRITON_INTERPRET=1 python tests/kernels/step_counts.py

The students are as on a GPU under autocast in bf16, but nothing that Triton compiles is launched. What counts is that a
launch of it would be made, or that PyTorch dispatches an operation, those inside of our ops too; views and empty
buffers do not count. No operation of a micro-batch may wait for the device.
"""

import contextlib
from collections import Counter
from unittest import mock

import pytest
import recorded_graph
import torch
from graphed_training import batch
from hybrid_cases import teacher
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkvinside.families import fused_layers
from rwkvinside.hybrid import document_attention
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.kernels.gpu import mixer, op, rotation, squared_error, window
from rwkvinside.kernels.gpu.launch import Launch
from rwkvinside.losses import chunked, fused
from rwkvinside.modeling import wkv7
from rwkvinside.stages.steps import AlignStep, DistillStep
from rwkvinside.teacher.signals import OnlineTeacher, TeacherModel
from rwkvinside.training.cuda_graphs import WARM_RUNS
from rwkvinside.training.local_engine import LocalEngine
from rwkvinside.training.process_group import Distributed
from rwkvinside.training.protocols import StepResult
from rwkvinside.training.settings import OptimConfig

OURS = {
    getattr(torch.ops.rwkvinside, name).default: function._init_fn
    for name, function in {
        "mixer_inputs_triton": mixer._inputs,
        "mixer_inputs_triton_backward": mixer._inputs_backward,
        "mixer_output_triton": mixer._output,
        "mixer_output_triton_backward": mixer._output_backward,
        "rotate_triton": rotation._rotate,
        "squared_error_triton": squared_error._error,
        "squared_error_triton_backward": squared_error._error_backward,
        "wkv7_triton": op._forward,
        "wkv7_triton_backward": op._backward,
        "window_triton": window._attend,
        "window_triton_backward": window._attend_backward,
    }.items()
}
launched = []  # names of kernels


class Count(TorchDispatchMode):
    """Counts operations by their origin: a module's forward, the kind of a node in the backward, or the step itself."""

    def __init__(self):
        super().__init__()
        self.places, self.found = ["step"], Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in OURS:
            with self, torch.no_grad():
                return OURS[function](*args, **kwargs or {})
        self.found.update((self.place(), name) for name in launched)
        launched.clear()
        read = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        out = function(*args, **kwargs or {})
        name = function.overloadpacket.__name__
        made = [x for x in tensors(out) if x.untyped_storage()._cdata not in read]
        if made and "empty" not in name or function._schema.is_mutable:
            self.found[self.place(), name] += 1
        return out

    def place(self):
        node = torch._C._current_autograd_node()
        return self.places[-1] if node is None else f"backward: {node.name().split('::')[-1]}"

    def watch(self, **models):
        for label, model in models.items():
            for name, module in model.named_modules():
                place = " ".join([label, *(part for part in name.split(".") if not part.isdigit())])
                module.register_forward_pre_hook(lambda *_, place=place: self.places.append(place))
                module.register_forward_hook(lambda *_: self.places.pop() and None)


class Inside(recorded_graph.Capture):
    """A capture that looks into our ops, whose own operations must not wait either."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in OURS:
            return super().__torch_dispatch__(function, types, args, kwargs)
        TorchDispatchMode.__enter__(self)
        try:
            with torch.no_grad():
                return OURS[function](*args, **kwargs or {})
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def note(launch):
    launched.append(launch.kernel.__name__)


@contextlib.contextmanager
def nothing_launched():
    """Results of kernels are whatever is in their memory, which counts as finite."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Launch, "run", note))
        triton = lambda backend, comparison, logits: fused.fused_form("triton", comparison, logits)  # noqa: E731
        stack.enter_context(mock.patch.object(chunked, "fused_form", triton))
        stack.enter_context(mock.patch.object(wkv7, "_rises", return_value=True))
        stack.enter_context(mock.patch.object(StepResult, "finite", True))
        yield


def training(objective, layers, recorder=None, **spec):
    """Engine, step, and models to watch."""
    student = HybridModel.from_teacher(
        teacher(layers=layers).bfloat16(), StudentConfig(backend="triton", **spec)
    ).eval()
    student.set_trainable(["mixer"] if objective == "align" else ["mixer", "mlp", "norms", "embed", "head"])
    trained = {n: p for n, p in student.canonical_parameters().items() if p.requires_grad}
    models = {"student": student}
    if objective == "align":
        step = AlignStep(dict.fromkeys(range(layers), 1.0))
    else:
        models["teacher"] = TeacherModel(teacher(layers=layers).bfloat16())
        step = DistillStep(OnlineTeacher(models["teacher"]))
        student.release_teacher()
    engine = LocalEngine(student, {"all": trained}, OptimConfig(), Distributed("cpu"), "bf16", recorder)
    engine.set_rates({"all": 1e-3})
    return engine, step, models


def operations(objective, layers, packed=False, **spec):
    """Count a step of one micro-batch."""
    engine, step, models = training(objective, layers, **spec)
    given = batch(0, 2, packed)
    engine.train_step([given], step, step.count(given))  # makes what stays
    count = Count()
    count.watch(**models)
    launched.clear()
    with count:
        engine.train_step([given], step, step.count(given))
    return count.found


def per_layer(objective, **options):
    """Return the operations of a layer, and those of a step outside of its layers, by origin and name."""
    with nothing_launched():
        one, two = (operations(objective, layers, **options) for layers in (2, 3))
    layer = Counter({key: n for key in two if (n := two[key] - one[key])})
    rest = Counter({key: n for key in two if (n := two[key] - 3 * layer[key])})
    return layer, rest


@pytest.mark.parametrize("objective, layer, rest", [("align", 132, 28), ("distill", 209, 75)])
def test_operations_of_a_step(objective, layer, rest):
    """Limits a little above what was counted when this was written."""
    found = per_layer(objective)
    assert found[0].total() <= layer
    assert found[1].total() <= rest


@pytest.mark.parametrize("objective", ["align", "distill"])
def test_the_teachers_rotation_is_one_operation(objective, monkeypatch):
    """In the types that a step computes in; norms and MLPs stay PyTorch code."""
    make = teacher

    def fused(**options):
        model = make(**options)
        fused_layers.fuse_layers(model)
        return model

    plain, rest = per_layer(objective)
    monkeypatch.setattr(f"{__name__}.teacher", fused)
    for name, result in (("_on_gpu", True), ("norm_form", None), ("is_gated", False)):
        monkeypatch.setattr(fused_layers, name, lambda x, result=result: result)
    layer, same = per_layer(objective)
    less, more = Counter(name for _, name in (plain - layer).elements()), layer - plain
    assert less == {"mul": 4, "neg": 2, "cat": 2, "add": 2}
    assert [name for _, name in more.elements()] == ["rotate_heads"] and same == rest


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("objective", ["align", "distill"])
def test_a_micro_batch_waits_for_nothing(objective, window, packed):
    recorder = recorded_graph.Recorder()
    engine, step, _ = training(objective, 2, recorder, window=window)
    given = batch(0, 2, packed)
    # in one document after the other attention runs on CPUs only
    attention = mock.patch.object(document_attention, "_one_by_one", lambda query, *_: query.clone())
    inside = mock.patch.object(recorded_graph, "Capture", Inside)
    with nothing_launched(), attention, inside:
        for _ in range(WARM_RUNS + 1):
            engine.train_step([given], step, step.count(given))
    assert len(recorder.graphs) == 1


if __name__ == "__main__":
    for name in ("align", "distill"):
        for where, found in zip(("a layer", "outside of layers"), per_layer(name), strict=True):
            print(f"{name}, {where}: {found.total()}")
            places = Counter()
            for (place, _), n in found.items():
                places[place] += n
            for place, n in places.most_common():
                print(f"    {n:4} {place}:", *(f"{key} {m}" for (at, key), m in found.items() if at == place))
