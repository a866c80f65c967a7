"""How much memory and disk a stage needs on one rank, by formula.

With t trainable parameters (fp32 masters), f bytes of the student's other weights, W ranks and z the ZeRO stage:

    weights      f + 4 t; z = 3: 1 / W of it, and what is whole at a time (a layer, or the head); DeepSpeed's bf16
                 weights: 2 bytes each
    bf16 copies  autocast: 2 bytes for each weight of a product that is not bf16 already; z = 3 with recomputed layers:
                 for those of one layer
    masters      4 t / W for z > 0: DeepSpeed's flat copy of what a rank updates
    gradients    4 t; z = 2, 3: 4 t / W and a bucket; bf16 weights: 2 t (z < 2), and fp32 sums 4 t / W
    optimizer    8 t, in 8 bits 2 t and a scale for each 256; 1 / W for z > 0
    activations  tokens of a micro-batch x what the layers keep (activations.py); recomputed: their inputs and one
                 layer; calibrate: hidden states and targets of all its tokens
    logits       a chunk of the student's and one of the teacher's, four blocks of them in fp32 (five with a
                 cross-entropy; none where a GPU compares them in place), and the head's weights in bf16
    row states   of a stateful stage: those that rows begin with, and those that they leave
    teacher      the bytes of a second model; sharded: 1 / W and what is whole at a time
    file pages   on a CPU, of weights in the type of their file: those that were read to be quantized; the system takes
                 them back when it has to

The peak is the larger of two moments of a step: when the forward of the last layer is done (of one micro-batch a step,
no gradients are there yet), and when the backward of the first one is (no activations are left). CUDA graphs keep the
gradients and all that a micro-batch needs, also while the student is evaluated. Next to the step there
are saving (DeepSpeed gathers masters and moments on the first rank's host, 12 t; one process writes those that it has)
and evaluating (a chunk of both models' logits; the last time also the original of a quantized teacher, where memory is
left for it).

The formula is checked against the resident memory of runs on a CPU (tests/planning/test_memory.py). On a GPU the CUDA
context, the allocator's rounding and kernels' own buffers come on top, which is `RESERVED`; nobody has measured it
there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .activations import FP32

BUCKET = 500_000_000  # elements that DeepSpeed reduces at a time


@dataclass(frozen=True)
class StudentMemory:
    """A student in memory, before anything is shared among ranks.

    Attributes:
        trainable: parameters that train.
        others: bytes of the rest: frozen, quantized, the teacher's attention that stays next to the mixers.
        parameters: all parameters that are not quantized.
        cast: weights of products of which autocast makes a bf16 copy.
        whole: bytes that ZeRO 3 has to gather at a time: the largest of a layer and the head.
        unpacked: weights of the largest quantized layer.
        head: trainable parameters of the head.
        mapped: bytes of weights in their file that were quantized, while others are still used from there.
    """

    trainable: int
    others: int
    parameters: int
    cast: int
    whole: int
    unpacked: int
    head: int
    mapped: int = 0


@dataclass(frozen=True)
class StepMemory:
    """What a stage computes on one rank.

    Attributes:
        tokens: of a micro-batch.
        micro_batches: of a step.
        kept: bytes a token that each layer keeps for its backward; empty: there is none.
        inputs: bytes a token that a layer keeps when it is recomputed; 0: it is not.
        edges: bytes a token that the model keeps outside of its layers.
        transient: bytes a token that come in addition while a layer's backward runs.
        chunk: bytes of the logits that are alive, and of what is computed from them.
        head_copy: weights of the head of which autocast makes a bf16 copy.
        teacher: bytes of a second model, teacher_whole: those of its largest layer or head.
        held: bytes that calibration holds.
        carried: bytes of the states that rows of a step begin with and leave.
        judged: bytes of the logits that an evaluation has at a time, and what they are compared with.
        original: bytes of the original of a quantized teacher, which the last evaluation is against.
    """

    tokens: int
    micro_batches: int = 1
    kept: list[int] = field(default_factory=list)
    inputs: int = 0
    edges: int = 0
    transient: int = 0
    chunk: int = 0
    head_copy: int = 0
    teacher: int = 0
    teacher_whole: int = 0
    held: int = 0
    carried: int = 0
    judged: int = 0
    original: int = 0


@dataclass(frozen=True)
class EngineSpec:
    """What trains, and how it is shared among ranks.

    Attributes:
        launched: DeepSpeed, else one process.
        zero: ZeRO stage.
        ranks: processes.
        bf16: products in bf16.
        bf16_weights: DeepSpeed's own bf16 mode.
        offload_optimizer, offload_parameters: to the host's memory.
        shard_teacher: a second model is sharded over the ranks.
        moment_bytes: of the optimizer's states, for each trainable parameter.
        graphs: micro-batches run as CUDA graphs.
    """

    launched: bool = False
    zero: int = 0
    ranks: int = 1
    bf16: bool = False
    bf16_weights: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    shard_teacher: bool = False
    moment_bytes: float = 8.0
    graphs: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        device: by purpose, at the largest moment of a step.
        saving, evaluating: the whole at other moments.
        original: of the original of a quantized teacher; the last evaluation has it in addition, if there is room.
        offloaded: what stays in the host's memory, when the device has its own.
        loaded: what is there while models are loaded.
        gathered: what the first rank has there while it saves.
    """

    device: dict[str, int]
    saving: int
    evaluating: int
    original: int = 0
    offloaded: int = 0
    loaded: int = 0
    gathered: int = 0

    @property
    def peak(self) -> int:
        """The largest moment of the stage on the device."""
        return max(sum(self.device.values()), self.saving, self.evaluating)

    def host(self, ranks: int = 1) -> int:
        """Return the most that so many ranks have in the memory of the host they share."""
        return ranks * self.offloaded + max(ranks * self.loaded, self.gathered)


def memory_of(weights: StudentMemory, work: StepMemory, engine: EngineSpec, *, cpu: bool) -> Memory:
    """Return the bytes on one rank by the formula above.

    Args:
        weights: the student.
        work: what a rank computes.
        engine: what trains.
        cpu: the device is the host itself, so that nothing is offloaded and a checkpoint is made where the weights are.
    """
    t, W = weights.trainable, engine.ranks
    zero = engine.zero if engine.launched else 0
    sizes = _weights(weights, engine, zero)
    sizes["optimizer"] = int(engine.moment_bytes * t / (W if zero else 1))
    teacher = work.teacher // W + work.teacher_whole if engine.shard_teacher else work.teacher
    if teacher:
        sizes["teacher"] = teacher
    if work.carried:
        sizes["row states"] = work.carried
    if weights.mapped:
        sizes["file pages"] = weights.mapped
    offloaded = 0
    if not cpu and engine.offload_optimizer:
        offloaded += sizes.pop("optimizer") + sizes.pop("masters", 0)
    if not cpu and engine.offload_parameters:
        offloaded += sizes["weights"] - weights.whole
        sizes["weights"] = weights.whole
    resident = sum(sizes.values())

    gradients, several = _gradients(t, engine, zero), work.micro_batches > 1 or engine.graphs
    kept = work.inputs * len(work.kept) + max(work.kept, default=0) if work.inputs else sum(work.kept)
    layer = work.transient * work.tokens + (2 if engine.bf16 else FP32) * weights.unpacked
    chunk = work.chunk + 2 * work.head_copy * engine.bf16
    # an engine that gathers weights does not keep their copies; the graph does, unless the layer is recomputed
    cast = weights.whole // 2 if zero == 3 and work.inputs else 2 * weights.cast
    # the head's gradient is made with its chunks, and added to what there is
    of_head = min(gradients, FP32 * weights.head)
    forward = {
        "bf16 copies": cast * (bool(work.kept) and engine.bf16 and not engine.bf16_weights),
        "gradients": gradients * several + of_head,
        "activations": work.tokens * (kept + work.edges) + work.held + max(layer - chunk, 0),
        "logits": chunk,  # gone before the layers' backward begins
    }
    backward = {"gradients": gradients, "activations": layer}
    step = max((forward, backward), key=lambda moment: sum(moment.values()))
    sizes |= {name: int(size) for name, size in step.items() if size}

    gathered = 12 * t if engine.launched or not cpu else 0
    return Memory(
        device=sizes,
        saving=resident + (gathered if cpu else 0),
        evaluating=resident + work.judged + engine.graphs * sum(int(size) for size in step.values()),
        original=work.original,
        offloaded=offloaded,
        loaded=0 if cpu else max(weights.others + FP32 * t + work.teacher, work.original),
        gathered=0 if cpu else gathered,
    )


def _weights(weights: StudentMemory, engine: EngineSpec, zero: int) -> dict[str, int]:
    t, W = weights.trainable, engine.ranks
    if engine.launched and engine.bf16_weights:
        whole = weights.others + 2 * t  # what is frozen is bf16 or quantized already
        sizes = {"weights": whole, "masters": FP32 * t // W}
    else:
        whole = weights.others + FP32 * t
        sizes = {"weights": whole} | ({"masters": FP32 * t // W} if zero else {})
    if zero == 3:
        sizes["weights"] = whole // W + weights.whole
    return sizes


def _gradients(t: int, engine: EngineSpec, zero: int) -> int:
    W = engine.ranks
    bucket = FP32 * min(BUCKET, t)
    if engine.launched and engine.bf16_weights:
        return FP32 * t // W + (2 * t if zero < 2 else bucket // 2)
    return FP32 * t if zero < 2 else FP32 * t // W + bucket


def moment_bytes(kind: str) -> float:
    """Return the bytes of an optimizer's states for one parameter.

    Two fp32 moments, or two bytes and their scales.
    """
    return 8.0 if kind == "adamw" else 2 + 2 * FP32 / 256


def checkpoint_bytes(saved: int, trainable: int, carried: int = 0) -> int:
    """Return the bytes of one checkpoint on disk.

    It has `saved` parameters in fp32, two Adam states of the trainable ones, and `carried` bytes of row states.
    """
    return FP32 * saved + 8 * trainable + carried
