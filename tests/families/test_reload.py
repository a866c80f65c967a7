"""Exports of all families are read again by transformers alone: the files that they carry need nothing of ours."""

import subprocess
import sys

import pytest
import torch
from hybrid_cases import batch_of, logits, teacher
from safetensors.torch import load_file, save_file

from rwkvinside.export.huggingface import build_hybrid
from rwkvinside.families.registry import FAMILIES
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig

RELOAD = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "rwkvinside":
            raise ImportError(f"an exported model imported {name}")

sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, *families = sys.argv[1:]
ids, found = load_file(f"{folder}/prompt")["ids"], {}
for family in families:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{family}", trust_remote_code=True, local_files_only=True)
    with torch.no_grad():
        found[family] = model.eval()(ids).logits
        model.generate(ids, max_new_tokens=2, do_sample=False)
save_file(found, f"{folder}/found")
"""


class Source:
    """What an export asks of a run."""

    teacher_id = "tiny"

    def __init__(self, config):
        self._config = config

    def teacher_config(self):
        return self._config


@pytest.mark.integration
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exports_are_read_without_the_package(tmp_path, dtype):
    # the layer that keeps attention is the teacher's own, or cut and without positions
    changed = {"attention_window": 5, "attention_sinks": 1, "attention_rope": False} if dtype == torch.float32 else {}
    ids = torch.randint(2, 50, (2, 15), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, tmp_path / "prompt")
    expected = {}
    for family in FAMILIES:
        lm = teacher(family)
        config = type(lm.config).from_dict(lm.config.to_dict())
        student = HybridModel.from_teacher(lm, StudentConfig(attention_layers=(1,), **changed)).eval()
        with torch.no_grad():
            expected[family] = logits(student, batch_of(ids), "student")
        model = build_hybrid(student, Source(config), dtype, tie_embeddings=None)
        type(model.config).register_for_auto_class()
        type(model).register_for_auto_class("AutoModelForCausalLM")
        model.save_pretrained(tmp_path / family)
    command = [sys.executable, "-I", "-c", RELOAD, str(tmp_path), *FAMILIES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "found")
    for family, wanted in expected.items():
        error = (found[family].float() - wanted).abs()
        if dtype == torch.float32:
            assert error.max() < 1e-5, family
        else:
            assert error.mean() < 0.03 * wanted.abs().mean(), family  # rounding may send a token to other experts
