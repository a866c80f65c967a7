"""Settings of the student: mixers, quantized layers, adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from ..modeling.mixer_presets import PRESETS
from ..support.settings import Fraction, NotNegative, Positive, Section, problem
from .layouts import FORMS, LayerChoice, Layout, resolve_layout

TITLES = {"miss": "MiSS", "bone": "Bone, which is MiSS in its bat form"}


class RanksConfig(Section):
    """Ranks of a mixer's low-rank maps."""

    decay: Positive | None = Field(None, description="Rank of the decay's low-rank part; null: by the model's width.")
    iclr: Positive | None = Field(None, description="Rank of the in-context learning rate; null: by the model's width.")
    value: Positive | None = Field(None, description="Rank of the mix with v_first; null: by the model's width.")
    key: Positive | None = Field(None, description="Rank of the mix with k_first; null: by the model's width.")
    gate: Positive | None = Field(None, description="Rank of the output gate; null: by the model's width.")


DEFAULT = "default"


def parse_by_layer(value: Any) -> Any:
    """Return a number for all layers as it is, a mapping by layer with texts as keys.

    A key is a layer (3), a range that includes its end (4-11), or "default" for all other layers.

    Raises:
        PydanticCustomError: neither of these, or a layer that is named twice.
    """
    numbers = list(value.values()) if isinstance(value, Mapping) else [value]
    if not numbers or any(type(number) is not int or number < 0 for number in numbers):
        raise problem(
            "must be a number of tokens, 0 or more, or such numbers by layer "
            "(0: 64, 1-11: 32, default: 0; with a space after each colon)"
        )
    if not isinstance(value, Mapping):
        return value
    named: set[int] = set()
    for key in map(str, value):
        layers = _layers(key)
        if key != DEFAULT and not layers:
            raise problem("has the key {}; name a layer (3), a range of them (4-11), or default", key)
        if twice := sorted(named.intersection(layers)):
            raise problem("names layer {} twice", twice[0])
        named.update(layers)
    return {str(key): number for key, number in value.items()}


def _layers(key: str) -> range:
    """Return the layers of a key of a mapping by layer, none for "default" and for what is not a key."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", key)
    return range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)


def at_layer(values: int | Mapping[str, int], layer: int) -> int:
    """Return what a number, or a mapping from `parse_by_layer`, says of a layer; 0 where it says nothing."""
    if isinstance(values, int):
        return values
    named = (number for key, number in values.items() if layer in _layers(key))
    return next(named, values.get(DEFAULT, 0))


ByLayer = Annotated[NotNegative | dict[str, NotNegative], BeforeValidator(parse_by_layer)]


class StudentConfig(Section):
    """What the student is."""

    preset: Literal["cxa079", "hxa079", "hxa07a", "hxa07b", "hxa07c", "cxa078", "cxa076r", "rad", "x070", "arwkv7"] = (
        Field("cxa079", description="Variant of the RWKV mixer, see docs/mixer.md.")
    )
    init: Literal["calibrated", "published", "scratch"] = Field(
        "calibrated",
        description="Start of the mixers: ready for calibration, the constants of the published code, or, for a model "
        "trained from nothing, RWKV-7's own.",
    )
    attention_layers: Layout = Field(
        (), description=f"Layers that keep the teacher's attention: {FORMS}; see docs/layers.md."
    )
    key_scale: Literal["decay", "log"] | None = Field(
        "decay", description="Scale of the key; log is how older checkpoints were trained; null: the preset's."
    )
    key_residual: bool | None = Field(None, description="Mix keys with those of the first mixer; null: the preset's.")
    window: ByLayer = Field(
        0,
        description="Tokens that mixers also attend to exactly, their own included; 0: the recurrence alone; "
        "{0: 64, 1-11: 32, default: 0}: by layer.",
    )
    sinks: ByLayer = Field(0, description="First tokens of a document that stay in that window; as window.")
    window_mix: Literal["softmax", "sum"] = Field(
        "softmax",
        description="How window and recurrence are joined: softmax, the recurrence as one more key's value, or sum.",
    )
    shift_ratio: Fraction = Field(
        1.0, description="Of init scratch: share of the token shift at the start; 0: each token sees itself alone."
    )
    chunk_size: Positive | None = Field(
        None, description="Tokens at a time when the model is processed by its state; null: as lm/session.py says."
    )
    linear_attention: bool = Field(False, description="Ablation of x070: no decay and no in-context learning rate.")
    output_scale: Annotated[float, Field(gt=0)] = Field(1.0, description="Factor of what the output projections read.")
    detach_first: bool = Field(False, description="No gradient from later layers into v_first and k_first.")
    backend: Literal["auto", "reference", "chunked", "native", "triton"] = Field(
        "auto", description="Implementation of the recurrence; auto: native on a CPU, triton on a GPU, if they can run."
    )
    precision: Literal["auto", "fp32", "high", "balanced", "fast"] = Field(
        "auto", description="Products of the triton backend; auto: fp32 for fp32 inputs, else balanced."
    )
    attention_rope: bool = Field(True, description="Layers that keep attention go on rotating queries and keys.")
    attention_log_base: Annotated[float, Field(gt=1)] | None = Field(
        None, description="The a of scores times log_a(position + a) in layers with attention; null: as they are."
    )
    attention_window: NotNegative = Field(
        0, description="Tokens that layers with attention see, their own included; 0: as many as the teacher's see."
    )
    attention_sinks: NotNegative = Field(
        0, description="First tokens of a document that they see too; with attention_window."
    )
    ranks: RanksConfig = Field(RanksConfig(), description="Ranks of the low-rank parts.")

    @field_validator("attention_layers", mode="before")
    @classmethod
    def _resolved(cls, layout: Any, info: ValidationInfo) -> Layout:
        count = (info.context or {}).get("num_layers")
        try:
            return resolve_layout(layout, count, allow_all=count is None or info.data.get("init") == "scratch")
        except ValueError as error:
            raise problem("{}", error) from None

    @model_validator(mode="after")
    def _possible(self) -> StudentConfig:
        if self.from_nothing and self.layer_choice is not None:
            raise problem(
                "attention_layers: choose {} measures a converted model, and this one begins as nothing",
                self.layer_choice.choose,
            )
        shifts = PRESETS[self.preset].get("token_shift", False)
        if self.shift_ratio != 1 and not (shifts and self.from_nothing):
            raise problem("shift_ratio {} needs init scratch and a preset with token shift: x070", self.shift_ratio)
        if self.linear_attention and not PRESETS[self.preset].get("group_norm", False):
            raise problem("linear_attention needs a preset with group norm, x070: what it sums up grows with the text")
        return self

    @property
    def from_nothing(self) -> bool:
        """Whether no part of the model is a teacher's."""
        return self.init == "scratch"

    @field_validator("attention_window")
    @classmethod
    def _of_kept_layers(cls, window: int, info: ValidationInfo) -> int:
        if window and info.data.get("attention_layers") == ():
            raise problem(
                "is {}, but no layer keeps attention; name layers under student.attention_layers, or leave it at 0; "
                "student.window is beside a recurrence",
                window,
            )
        return window

    @field_validator("attention_sinks")
    @classmethod
    def _attention_sinks(cls, sinks: int, info: ValidationInfo) -> int:
        if sinks and not info.data.get("attention_window", 0):
            raise problem("is {} without a window; set student.attention_window, or leave it at 0", sinks)
        return sinks

    @field_validator("window", "sinks")
    @classmethod
    def _known_layers(cls, values: int | dict[str, int], info: ValidationInfo) -> int | dict[str, int]:
        count = (info.context or {}).get("num_layers")
        if count is not None and not isinstance(values, int):
            for key in values:
                if (layers := _layers(key)) and layers[-1] >= count:
                    raise problem("has layer {}, but the teacher has layers 0 to {}", layers[-1], count - 1)
        return values

    @field_validator("sinks")
    @classmethod
    def _sinks(cls, sinks: int | dict[str, int], info: ValidationInfo) -> int | dict[str, int]:
        window = info.data.get("window", 0)
        if isinstance(window, int) and not window and sinks and (isinstance(sinks, int) or any(sinks.values())):
            raise problem("is {} without a window; set student.window, or leave sinks at 0", sinks)
        for key, number in {} if isinstance(sinks, int) else sinks.items():
            if number and (bare := [i for i in _layers(key) if not at_layer(window, i)]):
                raise problem("has first tokens in layer {}, which has no window", bare[0])
        return sinks

    @property
    def layer_choice(self) -> LayerChoice | None:
        """What decides later which layers keep attention; None: that is known."""
        return self.attention_layers if isinstance(self.attention_layers, LayerChoice) else None

    def missing_of_variant(self) -> list[str]:
        """Return what the published variant of an `hxa` preset is besides its mixer, and this student is not."""
        if not self.preset.startswith("hxa"):
            return []
        scale = PRESETS[self.preset]["key_scale"]
        missing = {
            "no layer keeps attention (student.attention_layers)": not self.attention_layers,
            "attention that is kept rotates (student.attention_rope)": self.attention_rope,
            f"the key scale is {self.key_scale}, not {scale} (student.key_scale)": self.key_scale not in (None, scale),
        }
        return [text for text, applies in missing.items() if applies]

    def mixer_overrides(self, layer: int) -> dict:
        """Return fields of `TimeMixerConfig` in which the mixer of a layer differs from the preset."""
        window = at_layer(self.window, layer)
        values = {name: getattr(self, name) for name in ("detach_first", "backend", "precision")}
        # a number of first tokens is meant for the layers that have a window
        values |= {"window": window, "sinks": at_layer(self.sinks, layer) if window else 0}
        values |= {"window_mix": self.window_mix} if self.window else {}
        # the k_a form of a preset is a matter of its equations, not a choice
        learned = PRESETS[self.preset]["key_scale"] == "k_a"
        values |= {} if self.key_scale is None or learned else {"key_scale": self.key_scale}
        values |= {} if self.key_residual is None else {"key_residual": self.key_residual}
        values |= {"linear_attention": self.linear_attention, "output_scale": self.output_scale}
        return values | {f"rank_{name}": rank for name, rank in self.ranks.model_dump(exclude_none=True).items()}


class QuantizeConfig(Section):
    """Frozen weights in 4 or 8 bits."""

    groups: list[str] = Field(
        [], description="Frozen linear layers to quantize: mlp, attention, teacher, mixer.proj, head; or expressions."
    )
    format: Literal["nf4", "fp4", "int8"] = Field("nf4", description="Type of the quantized weights (bitsandbytes).")
    double: bool = Field(True, description="Quantize the scales of nf4 and fp4 too.")
    block: Literal[32, 64, 128] = Field(64, description="Weights of nf4 and fp4 that share a scale.")
    method: Literal["nearest", "gptq"] = Field(
        "nearest",
        description="To the nearest value, or, nf4 and fp4, as suits the inputs of layers (GPTQ, GPTAQ).",
    )

    @property
    def fits_inputs(self) -> bool:
        """Whether weights are chosen for the inputs of their layers; never for int8."""
        return self.method == "gptq" and self.format != "int8"


class AdapterConfig(Section):
    """One adapter, on layers that no other one names."""

    kind: Literal["lora", "miss", "bone"] = Field(
        "lora", description="PEFT method; bone is MiSS in its `bat` form, which is what Bone became."
    )
    groups: list[str] = Field(["mlp"], min_length=1, description="Groups of linear layers, or regular expressions.")
    rank: Positive = Field(16, description="Rank (lora) or block size (miss, bone).")
    alpha: Annotated[float, Field(gt=0)] | None = Field(None, description="Scale of lora; null: twice the rank.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout in front of the adapter.")
    rank_stabilized: bool = Field(False, description="lora: divide alpha by the root of the rank (rsLoRA).")
    dora: bool = Field(False, description="lora: weight-decomposed (DoRA).")
    init: Literal["default", "pissa"] = Field(
        "default", description="lora: start at zero, or from principal components of the weight (PiSSA)."
    )

    @property
    def title(self) -> str:
        """Name for readers."""
        if self.kind != "lora":
            return TITLES[self.kind]
        forms = [("rank-stabilized", self.rank_stabilized), ("DoRA", self.dora), ("PiSSA", self.init == "pissa")]
        return " ".join(["LoRA", *(name for name, used in forms if used)])


@dataclass(frozen=True)
class LayerSpec:
    """Quantized layers and adapters of one stage.

    Attributes:
        quantize: which layers, and how.
        adapters: on layers that no other entry names.
    """

    quantize: QuantizeConfig = QuantizeConfig()
    adapters: tuple[AdapterConfig, ...] = ()

    @classmethod
    def of_stage(
        cls, quantize: QuantizeConfig, adapters: Sequence[AdapterConfig], groups: list[str] | None
    ) -> LayerSpec:
        """Return the quantized layers and adapters of a stage.

        Args:
            quantize, adapters: of the run.
            groups: what this stage quantizes; None: the run's groups.
        """
        stage_quantize = quantize if groups is None else quantize.model_copy(update={"groups": groups})
        return cls(stage_quantize, tuple(adapters))

    @property
    def has_frozen_weights(self) -> bool:
        """Whether a stage computes weights once and keeps them in a separate file."""
        return bool(self.quantize.groups) or any(adapter.init == "pissa" for adapter in self.adapters)
