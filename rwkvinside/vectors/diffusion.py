"""Large concept models with a diffusion head (arXiv 2412.08821, section 2.3), one tower or two, in small.

The context is read by a stack of mixers. One tower: the noisy next vector is one more element of that stack. Two: a
stack of its own, modulated by the time step (AdaLN), that attends to the context's hidden states.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from . import tmd as tmd_codes
from .mixers.base import Shared
from .model import Prediction, build_blocks
from .settings import WIDTH, ModelConfig

IQR_OF_NORMAL = 1.349  # a normal distribution's interquartile range, in standard deviations


class RobustNormalizer(nn.Module):
    """Subtracts the median of each dimension and divides by its interquartile range in standard deviations."""

    center: Tensor
    scale: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @torch.no_grad()
    def fit(self, vectors: Tensor) -> None:
        """Set center and scale from vectors (N, d)."""
        low, middle, high = vectors.float().quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0)
        self.center.copy_(middle)
        self.scale.copy_(((high - low) / IQR_OF_NORMAL).clamp(min=1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x."""
        return (x - self.center) / self.scale

    def inverse(self, x: Tensor) -> Tensor:
        """Return what `forward` was given."""
        return x * self.scale + self.center


def signal_levels(steps: int) -> Tensor:
    """Return alpha_bar at t = 0 to steps of the cosine schedule (Nichol and Dhariwal 2021); 1 at 0."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    levels = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (levels / levels[0]).clamp(min=1e-5).float()


class DenoiserBlock(nn.Module):
    """Cross-attention to the context and a feed-forward layer, both scaled, shifted and gated by the time step."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulate = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, h: Tensor, context: Tensor, ahead: Tensor | None, time: Tensor) -> Tensor:
        """Return h (B, S, D); context (B, T, D), `ahead` (S, T) True where it must not be seen, time (B, S, D)."""
        a, b, c, d, e, f = self.modulate(F.silu(time)).chunk(6, -1)
        x = self.norms[0](h) * (1 + a) + b
        h = h + (1 + c) * self.attention(x, context, context, attn_mask=ahead, need_weights=False)[0]
        x = self.norms[1](h) * (1 + d) + e
        return h + (1 + f) * self.ffn(x)


class LatentDiffusion(nn.Module):
    """Predicts by denoising: `forward` samples, `denoising_loss` trains.

    Args:
        config: resolved, with `diffusion`.

    Attributes:
        steps, guidance, seed: of a prediction; the same seed gives the same one.
    """

    causal = False  # it samples after the last vector only
    levels: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        refused = {"resolutions": config.resolutions, "quantize": config.quantize, "streams": config.streams > 1}
        refused |= {"residual": config.residual != "none", "readout": config.readout != "last"}
        if config.tmd not in ("none", "film") or any(refused.values()) or config.diffusion is None:
            names = ", ".join(["tmd: concat or mixer", *refused])
            raise UserError(f"model.arch={config.arch} denoises", f"with such a head there is no {names}")
        self.config, d = config, config.diffusion
        self.steps, self.guidance, self.seed = d.steps, d.guidance, 0
        D, d_in = config.d_model, config.d_in or WIDTH
        self.normalizer = RobustNormalizer(d_in)
        self.project = nn.Linear(d_in, D)
        self.blocks = nn.ModuleList(build_blocks(config))
        if not all(block.mixer.causal for block in self.blocks):
            raise UserError(f"model.pattern={config.pattern!r} looks ahead", "read the context with causal mixers")
        self.norm = nn.LayerNorm(D)
        self.noisy = nn.Linear(d_in, D)
        self.time = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.tmd = nn.Linear(tmd_codes.WIDTH, D, bias=False) if config.tmd == "film" else None
        if self.tmd is not None:  # starts as a head without codes
            nn.init.zeros_(self.tmd.weight)
        self.nothing = nn.Parameter(torch.randn(D) * 0.02)  # in place of the context, for guidance
        heads = max(1, D // 64)
        count = d.denoiser_layers if d.towers == "two" else 0
        self.denoiser = nn.ModuleList(DenoiserBlock(D, heads) for _ in range(count))
        self.head = nn.Linear(D, d_in)
        self.register_buffer("levels", signal_levels(d.train_steps), persistent=False)

    def fit(self, x: Tensor, target: Tensor) -> None:
        """Fit the normalizer on training targets (N, d)."""
        self.normalizer.fit(target)

    def forward(self, x: Tensor, *, tmd: Tensor | None = None) -> Prediction:
        """Sample the next vector after the last one of x (B, T, d); the other positions of y are 0."""
        y = self.sample(x, tmd)
        if self.config.normalize:
            y = F.normalize(y, dim=-1)
        return Prediction(F.pad(y[:, None], (0, 0, x.shape[1] - 1, 0)), None, (), x.new_zeros(()))

    def denoise(
        self, x: Tensor, noisy: Tensor, t: Tensor, tmd: Tensor | None = None, drop: Tensor | None = None
    ) -> Tensor:
        """Return the estimate of the clean normalized next vector, (B, d).

        Args:
            x: (B, T, d) normalized context.
            noisy: (B, d).
            t: (B,) step of the noise.
            tmd: (B, 16) codes that guide beside the step, needed with `tmd: film`.
            drop: (B,) bool, True: without the context.
        """
        if (tmd is None) != (self.tmd is None):
            raise UserError(
                f"model.tmd={self.config.tmd} and {'no ' if tmd is None else ''}TMD codes are given",
                "use data with codes and model.tmd=film, or neither",
            )
        h, time = self.project(x), self.time(_sinusoid(t, self.config.d_model))[:, None]
        if self.tmd is not None and tmd is not None:
            time = time + self.tmd(tmd.to(time.dtype))[:, None]
        if drop is not None:
            h = torch.where(drop[:, None, None], self.nothing.expand_as(h), h)
        target = self.noisy(noisy)[:, None] + time
        if not len(self.denoiser):
            return self.head(self.norm(self._stack(torch.cat([h, target], 1))[:, -1]))
        context = self.norm(self._stack(h))
        for block in self.denoiser:
            target = block(target, context, None, time)
        return self.head(target[:, 0])

    def denoising_loss(self, x: Tensor, target: Tensor, tmd: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the summed squared error of the estimate, and the estimates (B, d), denormalized.

        Args:
            x: (B, T, d).
            target: (B, d).
            tmd: (B, 16), see `denoise`.
        """
        d = self.config.diffusion
        x, clean = self.normalizer(x), self.normalizer(target)
        t = torch.randint(1, d.train_steps + 1, (len(x),), device=x.device)
        noisy = self.add_noise(clean, t, torch.randn_like(clean))
        estimate = self.denoise(x, noisy, t, tmd, torch.rand(len(x), device=x.device) < d.drop)
        return (estimate - clean).pow(2).mean(-1).sum(), self.normalizer.inverse(estimate)

    def add_noise(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return clean vectors (B, d) after t (B,) steps of noise (B, d); after none as they were."""
        level = self.levels[t][:, None]
        return level.sqrt() * clean + (1 - level).sqrt() * noise

    @torch.no_grad()
    def sample(self, x: Tensor, tmd: Tensor | None = None) -> Tensor:
        """Return vectors (B, d) by DDIM (Song et al. 2021), the same for the same seed and inputs."""
        d = self.config.diffusion
        x = self.normalizer(x)
        generator = torch.Generator(x.device).manual_seed(self.seed)
        noisy = d.noise * torch.randn(len(x), x.shape[-1], generator=generator, device=x.device)
        times = torch.linspace(d.train_steps, 0, self.steps + 1).round().long().tolist()
        clean = noisy
        for now, then in zip(times, times[1:], strict=False):
            t = torch.full((len(x),), now, device=x.device)
            clean = self.denoise(x, noisy, t, tmd)
            if self.guidance != 1:
                without = self.denoise(x, noisy, t, tmd, torch.ones(len(x), dtype=torch.bool, device=x.device))
                clean = without + self.guidance * (clean - without)
            a, b = self.levels[now], self.levels[then]
            noise = (noisy - a.sqrt() * clean) / (1 - a).sqrt()
            noisy = b.sqrt() * clean + (1 - b).sqrt() * noise
        return self.normalizer.inverse(clean)

    def _stack(self, h: Tensor) -> Tensor:
        shared = Shared()
        for block in self.blocks:
            h, _ = block(h, None, None, shared)
        return h


def _sinusoid(t: Tensor, width: int) -> Tensor:
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], -1), (0, width % 2))
