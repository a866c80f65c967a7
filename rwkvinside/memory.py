"""How much memory and disk a stage needs, by formula: rough, to see whether it fits, not to the last gigabyte.

Bytes per rank, with t trainable and f frozen parameters, w bytes a weight (2 in bf16, 4 in fp32), z the ZeRO stage and
W ranks:

    weights      w f' + 4 t; in bf16 + 2 t for copies (in process the fp32 weights are the masters); DeepSpeed in bf16:
                 2 (f' + t); f' = f + the teacher's attention that stays beside the mixers
    masters      DeepSpeed in bf16: 4 t / W
    gradients    4 t in process; DeepSpeed in fp32: 4 t, divided by W at z = 2; in bf16: 2 t (z < 2) + 4 t / W
    Adam         8 t, divided by W from z = 1 (DeepSpeed in bf16 always shards)
    activations  tokens of a micro-batch x (what one layer keeps) x layers; with checkpointing x (D layers + one layer);
                 calibrate: hidden states and targets of all its tokens at one layer, streams of one batch
    logits       chunk_tokens x vocabulary x 4 bytes x 4 (student, teacher, their logarithms)
    teacher      w x its parameters when it is a model of its own
"""

from __future__ import annotations

from dataclasses import dataclass

MICRO_TOKENS = 8192  # of a micro-batch, unless batch.micro_rows says otherwise


@dataclass(frozen=True)
class Shape:
    """What the estimate needs to know.

    Args:
        trainable, frozen: parameters of the student.
        kept_attention: parameters of the teacher's attention that stay beside the mixers.
        teacher: parameters of a separate teacher, 0 when there is none.
        layers, width, inner, mixer: layers, hidden size, size of the MLP, heads x head size.
        vocab: rows of the head, 0 when the stage computes no logits.
        mixers_only: only mixers keep activations (align).
        held: tokens whose hidden states are held at once (calibrate), else 0.
    """

    trainable: int
    frozen: int
    kept_attention: int
    teacher: int
    layers: int
    width: int
    inner: int
    mixer: int
    vocab: int
    mixers_only: bool
    held: int = 0


def memory_bytes(
    shape: Shape,
    *,
    tokens: int,
    chunk_tokens: int,
    bf16: bool,
    launcher: bool,
    zero: int,
    ranks: int,
    checkpointing: bool,
) -> dict[str, int]:
    """Bytes on one rank by purpose; see the formula above.

    Args:
        tokens: of a micro-batch.
        bf16: precision; else fp32.
        launcher: DeepSpeed rather than one process.
    """
    w = 2 if bf16 else 4
    t, frozen = shape.trainable, shape.frozen + shape.kept_attention
    sharded = ranks if launcher and (zero or bf16) else 1
    if launcher and bf16:
        weights, gradients = w * t, 4 * t // ranks + (2 * t if zero < 2 else 0)
    else:
        weights = (4 + (2 if bf16 else 0)) * t
        gradients = 4 * t // (ranks if launcher and zero == 2 else 1)
    # a mixer keeps about 14 fp32 streams of its width, an MLP three of its inner size, a layer four of the residual
    layer = 4 * 14 * shape.mixer
    layer += 0 if shape.mixers_only else w * (3 * shape.inner + 4 * shape.width)
    if shape.held:
        activations = 4 * shape.held * (2 * shape.width + shape.mixer) + tokens * layer
    elif checkpointing:
        activations = tokens * (w * shape.width * shape.layers + layer)
    else:
        activations = tokens * layer * shape.layers
    return {
        "weights": w * frozen + weights,
        "masters": 4 * t // sharded if launcher and bf16 else 0,
        "gradients": gradients,
        "Adam": 8 * t // sharded,
        "activations": activations,
        "logits": 16 * min(chunk_tokens, tokens) * shape.vocab,
        "teacher": w * shape.teacher,
    }


def checkpoint_bytes(saved: int, trainable: int) -> int:
    """Disk of one checkpoint: `saved` parameters in fp32 and two Adam states of the trainable ones."""
    return 4 * saved + 8 * trainable
