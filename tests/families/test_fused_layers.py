"""Which norms, MLPs and rotations kernels can take the place of, and what then calls them.

What the kernel of rotations computes in models is in tests/kernels/rotation_cases.py.
"""

import copy
import functools
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from hybrid_cases import teacher
from torch import nn
from torch.nn.functional import silu
from transformers import PreTrainedConfig
from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as rotate_side_by_side
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as rotate_part
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from rwkvinside.families import fused_layers
from rwkvinside.families.fused_layers import (
    PLAIN,
    SHIFTED,
    FusedRotation,
    Kernels,
    fuse_layers,
    is_gated,
    is_half_split,
    norm_form,
    with_fused_rotation,
)
from rwkvinside.families.registry import FAMILIES, find

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


def attention_of(family):
    return type(find(family).attention(find(family).layers(teacher(family))[0]))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_rotations_of_the_families(family):
    kind = attention_of(family)
    fused = with_fused_rotation(kind)
    if family == "glm4":  # pairs lie side by side
        assert fused is None
    else:
        assert issubclass(fused, kind) and fused.__name__ == kind.__name__ and fused.__module__ == kind.__module__
        assert with_fused_rotation(kind) is fused, "made once"
        assert with_fused_rotation(fused) is None


def test_a_rotation_is_known_by_what_it_computes():
    assert is_half_split(apply_rotary_pos_emb, 16) and not is_half_split(apply_rotary_pos_emb, 8)
    assert is_half_split(rotate_part, 16) and is_half_split(rotate_part, 8)
    assert not is_half_split(rotate_side_by_side, 16) and not is_half_split(rotate_side_by_side, 8)
    assert not is_half_split(lambda q, k, cos, sin: [x.float() for x in apply_rotary_pos_emb(q, k, cos, sin)], 16)
    assert not is_half_split(lambda q, k: (q, k), 16)


class Decorated(attention_of("llama")):
    @functools.wraps(attention_of("llama").forward)
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Derived(attention_of("llama")):
    more = 7


@pytest.mark.parametrize("kind", [Decorated, Derived])
def test_what_is_around_a_forward_stays(kind, calls):
    """Where a class inherits its forward, or calls it, its own methods still come first."""
    torch.manual_seed(0)
    lm = teacher("llama")
    attention, x = kind(lm.config, 0).eval(), torch.randn(2, 5, 32)
    angles = lm.model.rotary_emb(x, torch.arange(5)[None])
    wanted = attention(x, angles, None)[0]
    assert fuse_layers(attention) == {kind.__name__: 1}
    assert torch.equal(attention(x, angles, None)[0], wanted) and calls == [("rotation",)]
    assert isinstance(attention, kind) and isinstance(attention, FusedRotation)


def test_attention_whose_rotation_is_not_found_is_left_alone():
    class Wrapped(attention_of("llama")):
        @functools.wraps(attention_of("llama").forward)
        def forward(self, *args, **kwargs):
            return type(self).forward.__wrapped__(self, *args, **kwargs)

    assert with_fused_rotation(Wrapped) is None, "nothing behind a decorator is replaced"
    assert with_fused_rotation(nn.MultiheadAttention) is None and with_fused_rotation(nn.Linear) is None


def test_classes_of_transformers_and_other_models_stay_as_they_are(calls):
    one, other = teacher("llama"), teacher("llama")
    assert fuse_layers(one)["LlamaAttention"] == 3
    ids = torch.arange(6)[None]
    assert torch.equal(one(ids).logits, copy.deepcopy(one)(ids).logits)
    rotations = calls.count(("rotation",))
    assert rotations == 6
    other(ids)
    assert calls.count(("rotation",)) == rotations


@pytest.mark.parametrize("why", ["another type", "a part of the columns", "another place of the heads"])
def test_what_the_kernel_does_not_take_is_the_models_own(why, calls):
    rotate = with_fused_rotation(attention_of("llama")).forward.__globals__["apply_rotary_pos_emb"]
    q, k, angle = torch.randn(2, 3, 5, 8).bfloat16(), torch.randn(2, 1, 5, 8).bfloat16(), torch.randn(2, 5, 8)
    if why == "another type":  # fp32, which the result then has
        found, wanted = (f(q, k, angle, angle) for f in (rotate, apply_rotary_pos_emb))
        assert found[0].dtype == torch.float32
    elif why == "a part of the columns":
        with pytest.raises(RuntimeError, match="must match"):
            rotate(q, k, angle[..., :4].bfloat16(), angle[..., :4].bfloat16())
        found = wanted = ()
    else:
        given = q.transpose(1, 2), k.transpose(1, 2), angle.bfloat16(), angle.bfloat16()
        found, wanted = (f(*given, unsqueeze_dim=2) for f in (rotate, apply_rotary_pos_emb))
    assert calls == [] and all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.fixture
def calls(monkeypatch):
    """What kernels are asked for; they are PyTorch's code here, and all tensors count as on a GPU."""
    made = []

    def why_not(q, k, cos, sin):
        return None if q.dtype == k.dtype == cos.dtype == sin.dtype else "types differ"

    def rotate(*given):
        made.append(("rotation",))
        return rotate_part(*given)

    def norm(x, weight, eps, form):
        made.append(("norm", form))
        return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))

    def gate(x, y):
        made.append(("gate",))
        return silu(x) * y

    monkeypatch.setattr(fused_layers, "_kernels", lambda: Kernels(norm, gate))
    monkeypatch.setattr(fused_layers, "_rotation", lambda: SimpleNamespace(why_not=why_not, rotate=rotate))
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
    for name in ("_kernels", "_rotation"):
        monkeypatch.setattr(fused_layers, name, lambda: pytest.fail("there is no GPU"))
    block, x = Block(), torch.randn(2, 24)
    wanted = block(x)
    fuse_layers(block)
    assert torch.equal(block(x), wanted)
    lm, ids = teacher(), torch.arange(6)[None]
    wanted = lm(ids).logits
    fuse_layers(lm)
    assert torch.equal(lm(ids).logits, wanted)
