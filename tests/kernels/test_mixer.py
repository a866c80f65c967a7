"""The fused mixer: its properties (mixer_cases.py) in the interpreter and on a GPU, what it plans, what it refuses."""

import pytest
import torch
from triton_worker import run_cases

from rwkvinside.kernels.gpu import mixer
from rwkvinside.modeling.fused_mixer import is_fused_sequence
from rwkvinside.modeling.mixer_presets import TimeMixerConfig


@pytest.mark.integration
def test_properties_in_the_interpreter():
    run_cases("mixer_cases.py", interpret=True)


@pytest.mark.integration
def test_what_a_layer_and_a_step_cost():
    run_cases("mixer_counts.py", "step_counts.py", interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_properties_on_a_gpu():
    run_cases("mixer_cases.py", interpret=False)


@pytest.mark.parametrize("backend", ["auto", "reference", "chunked", "native", "triton"])
def test_a_cpu_runs_pytorch_code(backend):
    config = TimeMixerConfig(hidden_size=32, num_heads=2, num_kv_heads=1, head_size=16, backend=backend)
    assert not is_fused_sequence(config, torch.empty(1, 4, 32))


def arguments(B=2, T=5, H=4, G=2, N=16, **changes):
    """Arguments of `mixer.inputs` with residual mixes on the meta device, and what differs."""

    def empty(*shape):
        return torch.empty(shape, device="meta")

    full, shared = ((empty(B, T, 8), empty(8, heads * N)) for heads in (H, G))
    own = empty(B, T, G, N)
    given = dict(r=empty(B, T, H, N), k=own, v=own, decay=full, iclr=full, w0=empty(H * N), a0=empty(H * N))
    given |= dict(key_gate=shared, k_first=own, k0=empty(G * N), value_gate=shared, v_first=own, v0=empty(G * N))
    return {name: x for name, x in (given | {"key_scale": "log"} | changes).items() if x is not None}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"key_scale": "exp"}, "key_scale is 'exp'"),
        ({"key_scale": "k_a"}, "needs k_k and k_a"),
        ({"k0": None}, "belong together: k0 missing"),
        ({"cos": torch.empty(1, 5, 16)}, "sin missing"),
        ({"value_gate": None}, "value_gate, which is missing"),
        ({"r": torch.empty(2, 5, 3, 16)}, "G divide H"),
        ({"decay": (torch.empty(2, 5, 8), torch.empty(8, 32))}, "rank x 64"),
        ({"v_first": torch.empty(2, 5, 1, 16)}, "v_first has shape"),
        ({"w0": torch.empty(16)}, "w0 has 16 values, expected 64"),
        ({"v": torch.empty(2, 5, 2, 16, dtype=torch.float64)}, "v is torch.float64"),
    ],
)
def test_refusals_name_what_is_wrong(changes, message):
    given = arguments(**changes)
    r, k, v, decay, iclr = (given.pop(name) for name in ("r", "k", "v", "decay", "iclr"))
    with pytest.raises(ValueError, match=message):
        mixer.inputs(r, k, v, decay, iclr, **given)


def test_a_bonus_needs_v():
    x = torch.empty(1, 2, 2, 16)
    with pytest.raises(ValueError, match="bonus"):
        mixer.output(x, (x, x), scale=1.0, v=x)
