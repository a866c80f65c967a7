"""The Triton kernel that exports carry: its properties (carried_cases.py) in the interpreter and on a GPU, and who
computes where it does not."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from triton_worker import run_cases

from rwkvinside import kernels
from rwkvinside.modeling import mixer_step, wkv7_triton
from rwkvinside.modeling import wkv7 as door
from rwkvinside.modeling.mixer_presets import TimeMixerConfig

CASES = str(Path(__file__).with_name("carried_cases.py"))


@pytest.mark.integration
def test_properties_in_the_interpreter():
    run_cases(CASES, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_properties_on_a_gpu():
    run_cases(CASES, interpret=False)


def token(B=1, T=5, H=2, N=16, **options):
    """Inputs of the door."""
    return [-torch.rand(B, T, H, N, **options) for _ in range(6)]


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU, for what looks at nothing else."""

    device = torch.device("cuda")
    is_cuda = True


def choose(values, backend="auto", cu_seqlens=None):
    return door._choose(backend, [x.as_subclass(OnGPU) for x in values], cu_seqlens)


@pytest.fixture
def without_package(monkeypatch):
    """A machine with a GPU and Triton, without the package."""
    monkeypatch.setattr(door, "kernels", None)
    monkeypatch.setattr(wkv7_triton, "_interpreted", lambda: False)
    monkeypatch.setattr(wkv7_triton, "why_unavailable", lambda: None)
    door._warned.clear()


def test_a_gpu_without_the_package_takes_the_carried_kernel(without_package):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(token()) == choose(token(T=1)) == choose(token(), "triton") == "carried"
        with torch.no_grad():
            assert choose(token(requires_grad=True)) == "carried"
        assert choose(token(), "chunked") == "chunked" and choose(token(), "reference") == "reference"
        assert choose(token(dtype=torch.float64)) == "chunked", "without a word: it is asked for"
        assert door._choose("auto", token(), None) == "chunked", "on a CPU, without a word"


def test_the_package_comes_first(without_package, monkeypatch):
    monkeypatch.setattr(door, "kernels", kernels)
    monkeypatch.setattr(kernels, "why_unavailable", lambda backend: None)
    assert choose(token()) == choose(token(), "triton") == "triton"


@pytest.mark.parametrize(
    "options, bounds, said",
    [
        ({"requires_grad": True}, None, "rwkvinside is not installed.*computes no gradients"),
        ({}, torch.tensor([0, 5]), "rwkvinside is not installed.*takes no packed documents"),
        ({"N": 12}, None, "head sizes"),
    ],
)
def test_a_gpu_on_the_slow_path_says_why_once(without_package, options, bounds, said):
    with pytest.warns(UserWarning, match=f"slower chunked path: .*{said}") as caught:
        chosen = [choose(token(**options), cu_seqlens=bounds) for _ in range(2)]
    assert chosen == ["chunked", "chunked"] and len(caught) == 1
    with pytest.raises(RuntimeError, match=said):
        choose(token(**options), "triton", bounds)


def test_a_gpu_without_triton_says_what_to_install(monkeypatch):
    monkeypatch.setattr(door, "kernels", None)
    monkeypatch.setattr(wkv7_triton, "triton", None)
    wkv7_triton.why_unavailable.cache_clear()
    door._warned.clear()
    with pytest.warns(UserWarning, match="slower chunked path: .*pip install triton"):
        assert choose(token()) == "chunked"
    wkv7_triton.why_unavailable.cache_clear()


def test_the_file_can_be_imported_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"  # as if it were not installed
        "from rwkvinside.modeling.wkv7_triton import why_unavailable, why_unsupported\n"
        "import torch; print(why_unavailable(), why_unsupported('cuda', torch.bfloat16, 64))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "the package triton is not installed: pip install triton None\n"


def test_the_interfaces_agree():
    assert kernels.INTERFACE == door.INTERFACE and door._installed_kernels() is kernels


def test_kernels_with_another_interface_are_named_and_not_used(monkeypatch):
    monkeypatch.setattr(kernels, "INTERFACE", 7)
    with pytest.warns(UserWarning, match="have interface 7 and this model calls interface 3") as caught:
        assert door._installed_kernels() is None
    assert len(caught) == 1
    monkeypatch.delattr(kernels, "INTERFACE")
    with pytest.warns(UserWarning, match="have interface of an early version and this model calls interface 3"):
        assert door._installed_kernels() is None


def test_kernels_without_a_newer_function_are_used_for_the_rest(monkeypatch):
    """New functions leave the number of the interface as it is: an older package may lack them."""
    sizes = {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "head_size": 8}
    config = TimeMixerConfig.from_preset("cxa079", qk_norm=True, **sizes).replace(backend="triton", key_scale="decay")
    x = torch.zeros(1, 1, 16)
    monkeypatch.setattr(mixer_step, "why_unavailable", lambda *_: None)
    with torch.no_grad():
        assert mixer_step.is_fused(config, x, None)
        capped = config.replace(window=4, softcap=50.0)  # no kernel has a soft cap
        assert not mixer_step.is_fused(capped, x, None) and mixer_step.is_fused(capped.replace(softcap=None), x, None)
        stock = TimeMixerConfig.from_preset("x070", qk_norm=False, **sizes, backend="triton")
        parts = [stock, *(config.replace(**{name: True}) for name in ("token_shift", "group_norm"))]
        parts.append(TimeMixerConfig.from_preset("arwkv7", qk_norm=False, **sizes, backend="triton"))
        assert all(mixer_step.is_fused(part, x, None) for part in parts)
        monkeypatch.delattr(kernels, "shift_step")
        assert not any(mixer_step.is_fused(part, x, None) for part in parts) and mixer_step.is_fused(config, x, None)
        monkeypatch.delattr(kernels, "low_rank")
        assert not mixer_step.is_fused(config, x, None)
