"""Models of real shapes with random weights, made on the device, and the plan of a stage for each."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...config.load import load_config
from ...config.resolve import resolve
from ...data.batch import IGNORE, Batch
from ...families.fused_layers import fuse_layers
from ...modeling.hybrid_base import FP32_PARAMETERS, mixer_fields
from ...modeling.hybrid_qwen3 import HybridQwen3Config, HybridQwen3ForCausalLM
from ...planning.plan import meta_student
from ...stages.plan import RunSettings, StagePlan
from ...teacher.load import teacher_config


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3 with tied embeddings."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocab: int

    def fields(self) -> dict:
        """Return the Hugging Face configuration."""
        return {
            "model_type": "qwen3",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "intermediate_size": self.inner,
            "vocab_size": self.vocab,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        }


SMALL = Shape("0.6B", 28, 1024, 16, 8, 128, 3072, 151936)
LARGE = Shape("1.7B", 28, 2048, 16, 8, 128, 6144, 151936)
TINY = Shape("tiny", 2, 64, 2, 1, 32, 128, 256)
WINDOW, SINKS = 64, 4  # tokens, of the recipe `windowed`


def stage_plan(
    shape: Shape,
    objective: str,
    rows: int,
    seq_len: int,
    *,
    device: str,
    micro_rows: int | None = None,
    attention_layers: tuple[int, ...] = (),
    window: int = 0,
    fused: bool = True,
    checkpointing: bool | str = False,
) -> StagePlan:
    """Return what a user's configuration resolves to: bf16, all else by default.

    Args:
        shape: of the teacher.
        objective: of the stage, which has its name.
        rows, seq_len: of a step.
        device: "cuda" or "cpu".
        micro_rows: rows of a forward; None: about 4096 tokens.
        attention_layers: that are kept.
        window: tokens that every mixer attends to, and to the first of a document; 0: none.
        fused: rotations run as one kernel, and norms and MLPs where Liger is installed.
        checkpointing: `activation_checkpointing` of the stage.
    """
    stage = f"stages.{objective}"
    config = load_config(
        teacher=f"random/{shape.name}",
        data=["random"],
        out="none",
        overrides=[
            f"teacher.config={json.dumps(shape.fields())}",
            f"student.attention_layers={json.dumps(attention_layers)}",
            f"student.window={window}",
            f"student.sinks={SINKS if window else 0}",
            f"run=[{objective}]",
            f"device={device}",
            f"fused_layers={'auto' if fused else 'false'}",
            "precision=bf16",
            f"{stage}.data.seq_len={seq_len}",
            f"{stage}.batch.tokens={rows * seq_len}",
            f"{stage}.batch.micro_rows={json.dumps(micro_rows)}",
            f"{stage}.tokens={1000 * rows * seq_len}",
            f"{stage}.activation_checkpointing={json.dumps(checkpointing)}",
        ],
    )
    return resolve(config).stage(objective)


def random_teacher(run: RunSettings) -> PreTrainedModel:
    """Return a teacher with random weights in its type, in evaluation mode."""
    with torch.device(run.device):
        lm = AutoModelForCausalLM.from_config(teacher_config(run.teacher), dtype=run.teacher_dtype).eval()
    fuse_layers(lm, run.fused)
    return lm


def random_hybrid(run: RunSettings, dtype: torch.dtype) -> PreTrainedModel:
    """Return a student as it is exported and loaded, with random weights, in evaluation mode."""
    fields = teacher_config(run.teacher).to_dict()
    for name in ("model_type", "architectures", "transformers_version", "dtype", "_name_or_path"):
        fields.pop(name, None)
    shapes = meta_student(run)
    mixers = mixer_fields(shapes.mixer_configs)
    attention_rope = run.student.attention_rope
    config = HybridQwen3Config(**fields, **mixers, rwkv_layers=shapes.rwkv_layers, attention_rope=attention_rope)
    with torch.device(run.device):
        model = HybridQwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if not any(re.search(pattern, name) for pattern in FP32_PARAMETERS):
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def random_batch(vocab: int, rows: int, seq_len: int, device: str, document: int | None = None, seed: int = 0) -> Batch:
    """Return random tokens.

    Args:
        vocab: number of ids.
        rows, seq_len: of the batch.
        device: "cuda" or "cpu".
        document: tokens of a document, of which a row packs several; None: one a row.
        seed: of the tokens.
    """
    size = document or seq_len
    ids = torch.randint(vocab, (rows, seq_len), generator=torch.Generator().manual_seed(seed))
    place = torch.arange(seq_len)
    labels = ids.roll(-1, 1)
    labels[:, (place + 1) % size == 0] = IGNORE
    labels[:, -1] = IGNORE
    positions, segments = (x.expand(rows, -1).contiguous() for x in (place % size, (place // size + 1).int()))
    return Batch(ids, labels, positions, segments, tuple(range(rows))).to(device)
