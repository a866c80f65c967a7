"""A finished run, made by hand: a tiny teacher, a student whose every tensor differs from it, one checkpoint."""

import json

import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.training.checkpoint import Checkpointer

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def save_teacher(path, family="qwen3", dtype=torch.float32, **fields):
    torch.manual_seed(0)
    config = CONFIGS[family](
        **{
            "vocab_size": 67,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": [2, 3],
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        }
        | fields
    )
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)
    return path


def save_run(path, teacher, train=("mixer", "attention"), student=None, stage="distill"):
    """A run directory whose student is the teacher plus noise on what `train` names."""
    torch.manual_seed(1)
    student = {"preset": "cxa079", "attention_layers": [1], "key_scale": "decay"} | (student or {})
    lm = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    spec = StudentConfig(**student | {"attention_layers": tuple(student["attention_layers"])})
    model = HybridModel.from_teacher(lm, spec)
    model.set_trainable(train)
    with torch.no_grad():
        for p in model.canonical_parameters().values():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    Checkpointer(path / "stages" / stage, {}).save(2, model.student_state_dict(), None, {"stage": stage})
    stages = {
        "calibrate": {"tokens": 100},
        "distill": {"tokens": 200, "data": {"seq_len": 16, "train": ["/secret/place"]}},
    }
    config = {
        "teacher": {"path": str(teacher), "revision": None},
        "student": student,
        "run": list(stages),
        "stages": stages,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config | {"seed": 0, "data": {"train": ["/secret/place.jsonl"]}}))
    (path / "conversion.json").write_text(json.dumps({"finished_stages": ["calibrate", stage]}))
    rows = [
        {"kind": "train", "stage": "distill", "step": 1, "loss": 2.0},
        {"kind": "eval", "stage": "calibrate", "step": 1, "tokens": 100, "kl": 3.1, "ce": 4.2},
        {"kind": "eval", "stage": "distill", "step": 1, "tokens": 100, "kl": 0.5, "ce": 1.6},
        {"kind": "eval", "stage": "distill", "step": 2, "tokens": 200, "kl": 0.25, "ce": 1.5, "agreement": 0.875},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
