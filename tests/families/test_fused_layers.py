"""Which norms and MLPs Liger's kernels can take the place of, and what then calls them."""

from importlib import import_module

import pytest
import torch
from torch import nn
from torch.nn.functional import silu
from transformers import PreTrainedConfig
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from rwkvinside.families import fused_layers
from rwkvinside.families.fused_layers import PLAIN, SHIFTED, Kernels, fuse_layers, is_gated, norm_form

CONFIG = PreTrainedConfig(hidden_size=24, intermediate_size=40, hidden_act="silu", pad_token_id=None)


@pytest.mark.parametrize(
    "family, name, form",
    [
        ("llama", "LlamaRMSNorm", PLAIN),
        ("qwen2", "Qwen2RMSNorm", PLAIN),
        ("qwen3_moe", "Qwen3MoeRMSNorm", PLAIN),
        ("mistral", "MistralRMSNorm", PLAIN),
        ("phi3", "Phi3RMSNorm", PLAIN),
        ("glm4", "Glm4RMSNorm", PLAIN),
        ("granite", "GraniteRMSNorm", PLAIN),
        ("smollm3", "SmolLM3RMSNorm", PLAIN),
        ("gemma2", "Gemma2RMSNorm", SHIFTED),
        ("gemma3", "Gemma3RMSNorm", SHIFTED),
    ],
)
def test_the_norms_of_the_families(family, name, form):
    assert norm_form(getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)) == form


def test_a_norm_that_rounds_elsewhere_is_left_alone():
    assert norm_form(Olmo2RMSNorm) is None  # rounds once, behind the weight
    assert norm_form(nn.RMSNorm) is None and norm_form(nn.LayerNorm) is None


def test_only_a_plain_gate_of_silu_is_replaced():
    assert is_gated(Qwen3MLP(CONFIG))
    assert not is_gated(Phi3MLP(CONFIG)), "gate and value of one product"
    assert not is_gated(Qwen3MLP(PreTrainedConfig(hidden_size=24, intermediate_size=40, hidden_act="gelu")))
    mlp = Qwen3MLP(CONFIG)
    mlp.more = nn.Linear(2, 2)
    assert not is_gated(mlp)


@pytest.fixture
def calls(monkeypatch):
    """What the library is asked for; its kernels are PyTorch's code here, and all tensors count as on a GPU."""
    made = []

    def norm(x, weight, eps, form):
        made.append(("norm", form))
        return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))

    def gate(x, y):
        made.append(("gate",))
        return silu(x) * y

    monkeypatch.setattr(fused_layers, "_kernels", lambda: Kernels(norm, gate))
    monkeypatch.setattr(fused_layers, "_on_gpu", lambda x: True)
    return made


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = Qwen3RMSNorm(24, eps=1e-3), Qwen3MLP(CONFIG)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def test_modules_compute_the_same_with_the_librarys_kernels(calls):
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 5, 24)
    wanted = block(x)
    assert fuse_layers(block) == {"Qwen3RMSNorm": 1, "Qwen3MLP": 1}
    assert torch.allclose(block(x), wanted, atol=1e-6)
    assert calls == [("norm", PLAIN), ("gate",)]
    assert block.state_dict().keys() == Block().state_dict().keys()


def test_a_norm_of_another_type_than_its_input_stays_the_models_own(calls):
    norm, x = Qwen3RMSNorm(24), torch.randn(3, 24).bfloat16()
    wanted = norm(x)
    fuse_layers(norm)
    assert norm(x).dtype == wanted.dtype == torch.float32 and torch.equal(norm(x), wanted)
    assert calls == []


def test_on_a_cpu_nothing_is_called(monkeypatch):
    monkeypatch.setattr(fused_layers, "_kernels", lambda: pytest.fail("there is no GPU"))
    block, x = Block(), torch.randn(2, 24)
    wanted = block(x)
    fuse_layers(block)
    assert torch.equal(block(x), wanted)
