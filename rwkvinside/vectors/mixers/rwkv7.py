"""RWKV-7 (arXiv 2503.14456): the toolkit's own time mixer, with its kernels."""

from __future__ import annotations

from torch import Tensor

from ...modeling.mixer_presets import TimeMixerConfig
from ...modeling.time_mixer import MixerState, TimeMixer
from .base import Mixer, Place, Shared, State, fp32, real


class RWKV7(Mixer):
    """Stock RWKV-7: token shift, delta rule with a decay per channel, group norm.

    State: wkv (B, H, N, N) and the last input (B, D).

    Args:
        head_size: N.
        preset: of `mixer_presets`, one that does not rotate.
        init: see `init_mixer`; nothing is copied from a teacher here, so scratch.
        backend: of the recurrence, see `wkv7`.
    """

    kind = "rwkv7"

    def __init__(
        self,
        d_model: int,
        place: Place,
        *,
        head_size: int = 64,
        preset: str = "x070",
        init: str = "scratch",
        backend: str = "auto",
    ):
        super().__init__()
        if d_model % head_size:
            raise ValueError(f"head_size={head_size} does not divide d_model={d_model}")
        heads = d_model // head_size
        config = TimeMixerConfig.from_preset(
            preset,
            qk_norm=False,
            hidden_size=d_model,
            num_heads=heads,
            num_kv_heads=heads,
            head_size=head_size,
            rope=False,
            backend=backend,
        )
        self.time_mixer = TimeMixer(config, place.first, layer=place.layer, num_layers=place.layers, init=init)

    def mix(self, x: Tensor, state: State | None, lengths: Tensor | None, shared: Shared) -> tuple[Tensor, State]:
        """Run the time mixer; the first one of a model leaves v_first to the others."""
        before = None if state is None else MixerState(state[0], state[1] if len(state) > 1 else None)
        mask = None if lengths is None else real(lengths, x.shape[1])
        first = None if self.time_mixer.is_first else shared.first
        y, shared.first, after = self.time_mixer(x, first=first, state=before, mask=mask)
        return y, tuple(fp32(part) for part in after.tensors())
