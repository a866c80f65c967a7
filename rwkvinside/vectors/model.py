"""A latent vector model: adapter, layers of mixers, head; vectors in, the next vector out.

With `adapter: affine_ln`, one layer width other than the vectors' and plain layers this is the graph of the RWKV LVM:
Linear(768, 768), LayerNorm -> Linear(768, 512), six layers -> Linear(512, 768), Dropout(0.1), L2 norm. Its adapter is
said to map sentence-transformers' vectors to those of vec2text; it can learn that only from pairs of both
(`decoders.fit_converter`), and unit length is not what makes a vector decodable, see docs/vectors.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from . import tmd as tmd_codes
from .baselines import best_recent_mean
from .mixers.base import Mixer, Place, Shared, State, fp32
from .mixers.mixture import Mixture
from .mixers.registry import MIXERS, build_mixer, layer_options, mixer_class, parse_pattern
from .settings import WIDTH, ModelConfig

if TYPE_CHECKING:
    from .diffusion import LatentDiffusion


class ModelState(NamedTuple):
    """What a causal model carries from vector to vector.

    Attributes:
        layers: the state of every layer.
        total, count: sum (B, d) and number (B,) of all vectors, for `residual`; weighted where that is recent_mean.
        pooled: numerator (B, D) and denominator (B, 1) of the readout, () without.
    """

    layers: tuple[State, ...]
    total: Tensor
    count: Tensor
    pooled: State


class Prediction(NamedTuple):
    """What a model says.

    Attributes:
        y: (B, T, d), after every vector the next one; of a model that looks ahead only the last is one.
        state: to go on from; None of a model that looks ahead.
        lower: predictions of the heads of lower resolution, (B, T, width) each.
        extra: scalar to add to the mean loss (the quantizer's).
    """

    y: Tensor
    state: ModelState | None
    lower: tuple[Tensor, ...]
    extra: Tensor


class Block(nn.Module):
    """A mixer with norm, residual and feed-forward layer, or alone."""

    def __init__(self, mixer: Mixer, config: ModelConfig):
        super().__init__()
        self.mixer = mixer
        self.plain = config.block == "plain" or self.mixer.standalone
        if not self.plain:
            self.norm = nn.LayerNorm(config.d_model)
            width = round(config.ffn * config.d_model)
            if width:
                self.ffn_norm = nn.LayerNorm(config.d_model)
                self.ffn = nn.Sequential(nn.Linear(config.d_model, width), nn.GELU(), nn.Linear(width, config.d_model))
        self.has_ffn = hasattr(self, "ffn")

    def forward(
        self, x: Tensor, state: State | None, mask: Tensor | None, shared: Shared
    ) -> tuple[Tensor, State | None]:
        """Return the block's output (B, T, D) and state."""
        if self.plain:
            return self.mixer(x, state, mask=mask, shared=shared)
        y, state = self.mixer(self.norm(x), state, mask=mask, shared=shared)
        x = x + y
        return x + self.ffn(self.ffn_norm(x)) if self.has_ffn else x, state


class Quantizer(nn.Module):
    """Nearest of K learned codes, with the gradient passed straight through (van den Oord et al. 2017)."""

    COMMITMENT = 0.25

    def __init__(self, codes: int, width: int):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(codes, width) * width**-0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the quantized x, and the loss of codes and commitment per vector."""
        nearest = torch.cdist(x.detach().flatten(0, -2), self.codes).argmin(-1)
        code = self.codes[nearest].view_as(x)
        loss = F.mse_loss(code, x.detach()) + self.COMMITMENT * F.mse_loss(x, code.detach())
        return x + (code - x).detach(), loss


class VectorModel(nn.Module):
    """A latent vector model.

    Args:
        config: resolved, see `ModelConfig.resolved`.

    Attributes:
        causal: every layer is, so it predicts after each vector and can go on from a state.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        d_in = config.d_in or WIDTH
        width = d_in + (tmd_codes.WIDTH if config.tmd == "concat" else 0)
        adapter = config.adapter == "affine_ln"
        self.adapter = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) if adapter else nn.Identity()
        self.quantizer = Quantizer(config.quantize, width) if config.quantize else None
        self.project = nn.Linear(width, config.d_model) if width != config.d_model else nn.Identity()
        self.film = nn.Linear(tmd_codes.WIDTH, 2 * config.d_model) if config.tmd == "film" else None
        self.blocks = nn.ModuleList(block for _ in range(config.streams) for block in build_blocks(config))
        self.norm = nn.LayerNorm(config.d_model) if config.block == "residual" else nn.Identity()
        self.score = nn.Linear(config.d_model, 1) if config.readout == "attention" else None
        self.head = nn.Linear(config.d_model, d_in)
        self.lower = nn.ModuleList(nn.Linear(config.d_model, width) for width in config.resolutions)
        self.dropout = nn.Dropout(config.dropout)
        self.age = nn.Parameter(torch.tensor(1.0)) if config.residual == "recent_mean" else None
        if config.residual != "none":  # starts as the mean itself
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        if self.film is not None:  # starts as the identity
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)
        self.causal = all(block.mixer.causal for block in self.blocks)

    def forward(
        self,
        x: Tensor,
        *,
        tmd: Tensor | None = None,
        mask: Tensor | None = None,
        state: ModelState | None = None,
    ) -> Prediction:
        """Predict the next vector after each one.

        Args:
            x: (B, T, d) vectors.
            tmd: (B, 16) codes, needed where the configuration says so.
            mask: (B, T) bool, True = real; None: all.
            state: of the vectors before.
        """
        if (tmd is None) != (self.config.tmd == "none"):
            raise UserError(
                f"model.tmd={self.config.tmd} and {'no ' if tmd is None else ''}TMD codes are given",
                "use data with codes and model.tmd: concat, film or mixer, or neither",
            )
        h, extra = self.embed(x, tmd)
        outputs, states = [], []
        depth, every = len(self.blocks) // self.config.streams, self.config.skip_every
        for start in range(0, len(self.blocks), depth):
            shared, stream, skip = Shared(tmd=tmd), h, h
            for i in range(start, start + depth):
                stream, after = self.blocks[i](stream, None if state is None else state.layers[i], mask, shared)
                states.append(after)
                if every and (i - start + 1) % every == 0:
                    stream = skip = stream + skip
            outputs.append(stream)
        h = outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(0)
        h, pooled = self._read(self.norm(h), mask, state)
        y = self.dropout(self.head(h))
        lower = tuple(F.normalize(head(h), dim=-1) for head in self.lower)
        y, total, count = self._finish(x, y, mask, state)
        after = ModelState(tuple(states), total, count, pooled) if self.causal else None
        return Prediction(y, after, lower, extra)

    @torch.no_grad()
    def fit(self, x: Tensor, target: Tensor) -> None:
        """Start `residual: recent_mean` as that baseline.

        Args:
            x: (N, T, d) training contexts.
            target: (N, d).
        """
        if self.age is None:
            return
        factor, shift = best_recent_mean(x, target)
        self.age.fill_(torch.logit(torch.tensor(factor)))
        self.head.bias.copy_(shift)

    def embed(self, x: Tensor, tmd: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the input of the first layer (B, T, D), and the quantizer's loss."""
        if self.config.tmd == "concat" and tmd is not None:
            x = torch.cat([x, tmd[:, None].expand(-1, x.shape[1], -1).to(x.dtype)], -1)
        h, extra = self.adapter(x), x.new_zeros(())
        if self.quantizer is not None:
            h, extra = self.quantizer(h)
        h = self.project(h)
        if self.film is not None and tmd is not None:
            scale, shift = self.film(tmd.to(h.dtype))[:, None].chunk(2, -1)
            h = h * (1 + scale) + shift
        return h, extra

    def _finish(
        self, x: Tensor, y: Tensor, mask: Tensor | None, state: ModelState | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the prediction, and the sum and number of all vectors so far."""
        real = fp32(x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype))
        log_factor = real.new_zeros(()) if self.age is None else F.logsigmoid(fp32(self.age))
        ages = real.cumsum(1)  # of the state's vectors, after each one
        apart = ages[:, :, None] - ages[:, None]  # (B, T, T) real vectors between the latter and the former
        weights = torch.exp(log_factor * apart.clamp(min=0)).tril() * real[:, None]
        totals, counts = weights @ fp32(x), weights.sum(-1)
        if state is not None:
            left = torch.exp(log_factor * ages)
            totals, counts = totals + left[..., None] * state.total[:, None], counts + left * state.count[:, None]
        if self.config.residual != "none":
            y = (totals / counts.clamp(min=1e-9)[..., None]).to(y.dtype) + y
        if self.config.normalize:
            y = F.normalize(y, dim=-1)
        return y, totals[:, -1], counts[:, -1]

    def _read(self, h: Tensor, mask: Tensor | None, state: ModelState | None) -> tuple[Tensor, State]:
        """Return what the heads read: the hidden state, or that and a weighted mean of all so far."""
        if self.score is None:
            return h, ()
        weight = torch.exp(10 * torch.tanh(fp32(self.score(h)) / 10))  # bounded, so that no maximum over time is needed
        weight = weight if mask is None else weight * mask[..., None].to(weight.dtype)
        top, bottom = (weight * fp32(h)).cumsum(1), weight.cumsum(1)
        if state is not None:
            top, bottom = top + state.pooled[0][:, None], bottom + state.pooled[1][:, None]
        return h + (top / bottom.clamp(min=1e-9)).to(h.dtype), (top[:, -1], bottom[:, -1])


def build_blocks(config: ModelConfig) -> list[Block]:
    """Return the layers of a resolved configuration.

    Raises:
        UserError: unknown kinds or options, options of a kind that the pattern has not, `tmd: mixer` without a mixer
            that takes codes, or `pretrained` of another kind than gpt2.
    """
    layers = [layer.split("|") for layer in parse_pattern(config.pattern or "", config.layers)]
    kinds = [kind for layer in layers for kind in layer]
    if mixer_class(kinds[0]).standalone:
        if len(set(kinds)) > 1:
            raise UserError(f"model.pattern={config.pattern!r}", f"{kinds[0]} is a whole stack: use it alone")
        layers = layers[:1]
    for kind in config.options:
        if kind not in kinds:
            raise UserError(f"model.options.{kind}: no layer is of that kind", f"there are: {', '.join(set(kinds))}")
    if config.pretrained is not None and kinds[0] != "gpt2":
        raise UserError(f"model.pretrained={config.pretrained} with {config.pattern}", "only gpt2 begins so")
    routes = any(len(layer) > 1 for layer in layers)
    takes = [kind for kind in MIXERS if mixer_class(kind).takes_codes]
    if config.tmd == "mixer" and not routes and not set(takes) & set(kinds):
        raise UserError(f"model.tmd=mixer with {config.pattern}", f"only {', '.join(takes)} take codes: use film")
    d_tmd = tmd_codes.WIDTH if config.tmd == "mixer" else 0
    blocks = []
    for i, layer in enumerate(layers):
        mixers = []
        for kind in layer:
            nth = sum(kind in before for before in layers[:i])
            options = layer_options(config.options.get(kind, {}), nth)
            options |= {"d_tmd": d_tmd} if d_tmd and kind in takes else {}
            mixers.append(build_mixer(kind, config.d_model, Place(i, config.layers, nth == 0), **options))
        blocks.append(Block(mixers[0] if len(mixers) == 1 else Mixture(mixers, config.d_model, d_tmd), config))
    return blocks


def build_model(config: ModelConfig) -> VectorModel | LatentDiffusion:
    """Return the model of a configuration: a `VectorModel`, or a `LatentDiffusion` where it denoises."""
    config = config.resolved()
    if config.diffusion is None:
        return VectorModel(config)
    from .diffusion import LatentDiffusion

    return LatentDiffusion(config)
