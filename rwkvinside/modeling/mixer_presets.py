"""Configuration of a time mixer, and the table of the published variants."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

# What the published mixers differ in. None = as the teacher has it. `hxa` names are the same mixers in a hybrid whose
# kept attention carries no rotation.
PRESETS: dict[str, dict] = {
    "cxa079": dict(rope=True, qk_norm=None, value_path="residual_kv", key_residual=True, bonus=True, key_scale="log"),
    "hxa07a": dict(rope=True, qk_norm=None, value_path="plain", key_residual=False, bonus=False, key_scale="log"),
    "hxa07b": dict(rope=True, qk_norm=None, value_path="additive", key_residual=False, bonus=False, key_scale="log"),
    "hxa07c": dict(rope=True, qk_norm=None, value_path="additive", key_residual=False, bonus=False, key_scale="decay"),
    "cxa078": dict(
        rope=True, qk_norm=True, value_path="residual_full", key_residual=False, bonus=True, key_scale="log"
    ),
    "cxa076r": dict(
        rope=False, qk_norm=True, value_path="residual_full", key_residual=False, bonus=True, key_scale="log"
    ),
    "rad": dict(
        rope=True, qk_norm=None, value_path="residual_full", key_residual=False, bonus=False, key_scale="decay"
    ),
    "x070": dict(
        rope=False,
        qk_norm=False,
        value_path="residual_full",
        key_residual=False,
        bonus=True,
        key_scale="k_a",
        token_shift=True,
        group_norm=True,
    ),
    # what llama.cpp computes of a model with the MLPs of Llama (its architecture of this name)
    "arwkv7": dict(
        rope=False,
        qk_norm=False,
        qkv_bias=False,
        output_bias=False,
        value_path="residual_full",
        key_residual=False,
        bonus=True,
        key_scale="k_a",
    ),
}


PRESETS["hxa079"] = PRESETS["cxa079"]


@dataclass
class TimeMixerConfig:
    """Everything that determines a mixer's parameters and equations.

    Only plain values, so that a config.json can hold it.

    Attributes:
        hidden_size: D, width of the residual stream.
        num_heads, num_kv_heads, head_size: H, G, N; G divides H; C = H * N may differ from D.
        rank_decay, rank_iclr, rank_value, rank_key, rank_gate: low-rank sizes; 0: as `default_ranks` says.
        rope: rotate r and k exactly as the teacher rotates q and k.
        qk_norm: RMS norm of r and k before the rotation, with epsilon norm_eps.
        norm_over: "head" (each by itself) or "heads" (all together).
        value_path: "plain", "residual_kv" (mix with v_first at G heads), "residual_full" (at H heads),
            "additive" (+ 0.2 x v1 v2 at H heads).
        key_residual: mix the key with k_first, at G heads.
        bonus: add (r . k r_k) v of the current token.
        key_scale: k * (1 - s + iclr) with s the decay ("decay") or its log-domain value ("log", as older checkpoints
            were trained); "k_a" is the stock RWKV-7 form with learned k_k and k_a.
        token_shift, group_norm: stock RWKV-7 only; without the norm the output is scaled by N^-0.5.
        linear_attention: neither decay nor in-context learning rate, S_t = S_{t-1} + v_t k_t^T (Katharopoulos et al.,
            arXiv 2006.16236, without its feature map): an ablation. Its state grows with the text and needs the norm.
        output_scale: factor of what the output projection reads.
        qkv_bias, output_bias: biases copied from the teacher.
        window, sinks: attend exactly to the last `window` tokens and the first `sinks` of the document, beside the
            recurrence (`window_attention`); 0 and 0: not at all.
        window_mix: how the window and the recurrence are added: "sum", each with its own weight, or "softmax", in which
            the recurrence's output is the value of one more key, with a score for all that lies beyond the window.
        softcap: of the scores in that window, where the teacher's have one.
        detach_first: no gradient from later layers into v_first and k_first.
        backend, precision: see `wkv7`.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rank_decay: int = 0
    rank_iclr: int = 0
    rank_value: int = 0
    rank_key: int = 0
    rank_gate: int = 0
    rope: bool = True
    qk_norm: bool = False
    norm_eps: float = 1e-6
    norm_over: str = "head"
    value_path: str = "residual_kv"
    key_residual: bool = True
    bonus: bool = True
    key_scale: str = "decay"
    token_shift: bool = False
    group_norm: bool = False
    linear_attention: bool = False
    output_scale: float = 1.0
    qkv_bias: bool = False
    output_bias: bool = False
    window: int = 0
    sinks: int = 0
    window_mix: str = "sum"
    softcap: float | None = None
    detach_first: bool = False
    backend: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("value_path", self.value_path, ("plain", "residual_kv", "residual_full", "additive")),
            ("key_scale", self.key_scale, ("decay", "log", "k_a")),
            ("norm_over", self.norm_over, ("head", "heads")),
            ("window_mix", self.window_mix, ("sum", "softmax")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, allowed: {', '.join(allowed)}")
        if self.window < 0 or self.sinks < 0 or self.sinks and not self.window:
            raise ValueError(f"window {self.window} and sinks {self.sinks}: neither is negative, sinks need a window")
        if self.linear_attention and not self.group_norm:
            raise ValueError("linear_attention needs group_norm (preset x070): what is summed up grows with the text")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        for name, rank in default_ranks(self.hidden_size, self.num_heads * self.head_size).items():
            if not getattr(self, f"rank_{name}"):
                setattr(self, f"rank_{name}", rank)

    @classmethod
    def from_preset(
        cls, preset: str, *, qk_norm: bool, qkv_bias: bool = False, output_bias: bool = False, **overrides: Any
    ) -> TimeMixerConfig:
        """Return a published variant for a teacher.

        Args:
            preset: a name of `PRESETS`.
            qk_norm, qkv_bias, output_bias: whether the teacher has them; a preset may be without.
            overrides: fields that differ from the preset.

        Raises:
            ValueError: unknown preset, or a field value outside its choices.
        """
        if preset not in PRESETS:
            raise ValueError(f"unknown mixer preset {preset!r}: choose one of {', '.join(sorted(PRESETS))}")
        values = {name: value for name, value in PRESETS[preset].items() if value is not None}
        of_teacher = {"qk_norm": qk_norm, "qkv_bias": qkv_bias, "output_bias": output_bias}
        return cls(**(of_teacher | values | overrides))

    def to_dict(self) -> dict:
        """Return all fields by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> TimeMixerConfig:
        """Return the configuration with these fields.

        Raises:
            ValueError: a field that does not exist, or a value outside its choices.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown mixer fields {unknown}, known: {sorted(known)}")
        return cls(**values)

    def replace(self, **changes: Any) -> TimeMixerConfig:
        """Return a copy in which some fields differ."""
        return replace(self, **changes)


def check_first_layer(configs: dict[int, TimeMixerConfig]) -> None:
    """Refuse mixers that would mix in values or keys of a layer with other heads.

    Args:
        configs: of all RWKV layers of a model, by index in ascending order.

    Raises:
        ValueError: a layer that reads v_first or k_first and has other heads than the first one.
    """
    sizes = {i: (c.num_heads, c.num_kv_heads, c.head_size) for i, c in configs.items()}
    for i, c in configs.items():
        first = min(configs)
        if sizes[i] != sizes[first] and (c.key_residual or c.value_path.startswith("residual")):
            raise ValueError(
                f"layer {i} has (num_heads, num_kv_heads, head_size) {sizes[i]} and layer {first}, whose values and "
                f"keys it mixes in, {sizes[first]}: use value_path plain or additive, and no key residual"
            )


def default_ranks(hidden_size: int, width: int) -> dict[str, int]:
    """Return the low-rank sizes of the published format.

    Args:
        hidden_size: D; below 1024 the floors of 256 shrink to D/4.
        width: C, all heads together.
    """

    def round32(x: float) -> int:
        return 32 * round(x / 32)

    floor = min(256, hidden_size // 4)
    residual = max(32, round32(1.3 * width**0.5))
    return dict(
        decay=max(floor, round32(1.7 * width**0.6)),
        iclr=max(32, round32(1.8 * width**0.5)),
        value=residual,
        key=residual,
        gate=max(floor, round32(0.35 * width**0.8)),
    )
