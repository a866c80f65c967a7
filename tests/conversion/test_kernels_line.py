"""What a run says about who computes the recurrence."""

import pytest
from hybrid_cases import teacher
from plans import run_settings

from rwkvinside import kernels
from rwkvinside.conversion.run import kernels_of
from rwkvinside.families.fused_layers import ALL
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig


@pytest.mark.parametrize(
    "device, precision, student, said",
    [
        ("cuda", "bf16", {}, "triton, balanced"),
        ("cuda", "fp32", {}, "triton, fp32"),
        ("cuda", "bf16", {"precision": "high", "backend": "triton"}, "triton, high"),
        ("cpu", "bf16", {}, "native"),
        ("cpu", "fp32", {"backend": "reference"}, "reference"),
    ],
)
def test_who_computes_is_said(monkeypatch, device, precision, student, said):
    monkeypatch.setattr(kernels, "why_unavailable", lambda backend: None)
    monkeypatch.setattr(kernels, "why_unsupported", lambda *properties: None)
    shapes = HybridModel.from_teacher(teacher(), StudentConfig(**student))
    settings = run_settings(device=device, precision=precision, student=StudentConfig(**student))
    assert kernels_of(settings, shapes) == said


def test_the_slow_path_says_why(monkeypatch):
    monkeypatch.setattr(kernels, "why_unavailable", lambda backend: f"no {backend} here")
    shapes = HybridModel.from_teacher(teacher(), StudentConfig())
    assert kernels_of(run_settings(device="cuda"), shapes) == "chunked, in PyTorch: no triton here"


def test_fused_layers_are_said():
    settings = run_settings(device="cuda", fused=ALL)
    assert kernels_of(settings, HybridModel.from_teacher(teacher(), StudentConfig())).endswith(
        "; norms and MLPs: Liger Kernel"
    )
