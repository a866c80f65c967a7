"""S4 in its diagonal form, S4D (Gu et al. 2022, arXiv 2206.11893)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Mixer, Place, Shared, State, fp32, take

INITS = ("lin", "inv", "legs", "random")


class S4(Mixer):
    """A diagonal state space per channel: a convolution in training, a recurrence with a state.

    State: (B, D, N / 2, 2), real and imaginary parts.

    Args:
        d_state: N, even; conjugate pairs are kept once.
        init: eigenvalues as of S4D-Lin, S4D-Inv, the diagonal of HiPPO-LegS, or random.
        dt_min, dt_max: range of the time steps of the channels.
    """

    kind = "s4"
    dynamics = ("log_dt", "log_a", "a_imag")

    def __init__(
        self,
        d_model: int,
        place: Place,
        *,
        d_state: int = 64,
        init: str = "lin",
        dt_min: float = 0.001,
        dt_max: float = 0.5,
    ):
        super().__init__()
        if init not in INITS or d_state < 2 or d_state % 2:
            raise ValueError(f"init={init!r}, d_state={d_state}: init is {', '.join(INITS)}, d_state even")
        N = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(d_model).uniform_(math.log(dt_min), math.log(dt_max)))
        real_part, imaginary = _eigenvalues(init, N)
        self.log_a = nn.Parameter(real_part.log().repeat(d_model, 1))
        self.a_imag = nn.Parameter(imaginary.repeat(d_model, 1))
        self.C = nn.Parameter(torch.randn(d_model, N, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(d_model))
        self.output = nn.Linear(d_model, 2 * d_model)

    def mix(self, x: Tensor, state: State | None, lengths: Tensor | None, shared: Shared) -> tuple[Tensor, State]:
        """Convolve, and add what the state before still gives."""
        T = x.shape[1]
        u = fp32(x).transpose(1, 2)  # (B, D, T)
        a = torch.complex(-fp32(self.log_a).exp(), fp32(self.a_imag))
        dt_a = a * fp32(self.log_dt).exp()[:, None]  # (D, N)
        c = torch.view_as_complex(fp32(self.C)) * (dt_a.exp() - 1) / a  # zero-order hold
        powers = torch.exp(dt_a[..., None] * torch.arange(T, device=x.device))  # (D, N, T)
        kernel = 2 * torch.einsum("dn,dnt->dt", c, powers).real
        y = fft_conv(u, kernel) + u * fp32(self.D)[:, None]
        before = None if state is None else torch.view_as_complex(state[0].to(u.dtype).contiguous())
        if before is not None:
            y = y + 2 * torch.einsum("bdn,dnt->bdt", before * dt_a.exp() * c, powers).real
        after = _final_state(x, lengths, powers, dt_a, before)
        y = F.glu(self.output(F.gelu(y.transpose(1, 2).to(x.dtype))), -1)
        return y, (torch.view_as_real(after),)


def _final_state(x: Tensor, lengths: Tensor | None, powers: Tensor, dt_a: Tensor, before: Tensor | None) -> Tensor:
    """Return the state (B, D, N) after the tokens that count: rows are moved to the end of the window for that."""
    B, T, _ = x.shape
    u = fp32(x)
    total = torch.full((B,), T, device=x.device) if lengths is None else lengths
    if lengths is not None:
        at = torch.arange(T, device=x.device) - (T - lengths)[:, None]
        u = take(u, at.clamp(min=0)) * (at >= 0)[..., None].to(u.dtype)
    after = torch.einsum("btd,dnt->bdn", u.to(powers.dtype), powers.flip(-1))
    if before is not None:
        after = after + before * torch.exp(dt_a * total[:, None, None])
    return after


def _eigenvalues(init: str, N: int) -> tuple[Tensor, Tensor]:
    """Return minus the real parts and the imaginary parts of N eigenvalues."""
    n, half = torch.arange(N, dtype=torch.float32), torch.full((N,), 0.5)
    if init == "lin":
        return half, math.pi * n
    if init == "inv":
        return half, 2 * N / math.pi * (2 * N / (2 * n + 1) - 1)
    if init == "random":
        return torch.rand(N) + 1e-3, math.pi * N * torch.rand(N)
    i = torch.arange(2 * N, dtype=torch.float64)  # HiPPO-LegS: normal plus low rank; the normal part's eigenvalues
    p = torch.sqrt(2 * i + 1)
    A = -0.5 * p[:, None] * p * torch.where(i[:, None] > i, 1.0, torch.where(i[:, None] < i, -1.0, 0.0))
    values = torch.linalg.eigvals(A - 0.5 * torch.eye(2 * N, dtype=torch.float64)).imag.sort().values
    return half, values[N:].float()


def fft_conv(u: Tensor, kernel: Tensor) -> Tensor:
    """Return the causal convolution of u (B, D, T) with a kernel (D, T), in the dtype of u."""
    T = u.shape[-1]
    product = torch.fft.rfft(fp32(u), n=2 * T) * torch.fft.rfft(fp32(kernel), n=2 * T)
    return torch.fft.irfft(product, n=2 * T)[..., :T].to(u.dtype)
