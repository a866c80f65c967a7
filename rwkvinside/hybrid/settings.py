"""Settings of the student: mixers, quantized layers, adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from ..support.settings import Positive, Section, problem


class RanksConfig(Section):
    decay: Positive | None = Field(None, description="Rank of the decay's low-rank part; null: by the model's width.")
    iclr: Positive | None = Field(None, description="Rank of the in-context learning rate; null: by the model's width.")
    value: Positive | None = Field(None, description="Rank of the mix with v_first; null: by the model's width.")
    key: Positive | None = Field(None, description="Rank of the mix with k_first; null: by the model's width.")
    gate: Positive | None = Field(None, description="Rank of the output gate; null: by the model's width.")


class StudentConfig(Section):
    preset: Literal["cxa079", "hxa079", "hxa07a", "hxa07b", "hxa07c", "cxa078", "cxa076r", "rad", "x070"] = Field(
        "cxa079", description="Variant of the RWKV mixer, see docs/mixer.md."
    )
    attention_layers: tuple[int, ...] = Field((), description="Indices of layers that keep the teacher's attention.")
    key_scale: Literal["decay", "log"] | None = Field(
        "decay", description="Scale of the key; log is how older checkpoints were trained; null: the preset's."
    )
    key_residual: bool | None = Field(None, description="Mix keys with those of the first mixer; null: the preset's.")
    init: Literal["calibrated", "published"] = Field(
        "calibrated", description="Start of the mixers: ready for calibration, or the constants of the published code."
    )
    detach_first: bool = Field(False, description="No gradient from later layers into v_first and k_first.")
    backend: Literal["auto", "reference", "chunked", "native", "triton"] = Field(
        "auto", description="Implementation of the recurrence; auto: native on a CPU, triton on a GPU, if they can run."
    )
    precision: Literal["auto", "fp32", "high", "balanced", "fast"] = Field(
        "auto", description="Products of the triton backend; auto: fp32 for fp32 inputs, else balanced."
    )
    attention_rope: bool = Field(True, description="Layers that keep attention go on rotating queries and keys.")
    ranks: RanksConfig = Field(RanksConfig(), description="Ranks of the low-rank parts.")

    @field_validator("attention_layers")
    @classmethod
    def _layers(cls, layers: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if twice := sorted({i for i in layers if layers.count(i) > 1}):
            raise problem("has layer {} twice; name each layer once", *twice)
        count = (info.context or {}).get("num_layers")
        if count is not None:
            if bad := sorted(i for i in layers if not 0 <= i < count):
                raise problem("has layer {}, but the teacher has layers 0 to {}", ", ".join(map(str, bad)), count - 1)
            if len(layers) == count:
                raise problem("keeps all {} layers; leave at least one to convert", count)
        return tuple(sorted(layers))


class QuantizeConfig(Section):
    groups: list[str] = Field(
        [], description="Frozen linear layers to quantize: mlp, attention, teacher, mixer.proj, head; or expressions."
    )
    format: Literal["nf4", "fp4", "int8"] = Field("nf4", description="Type of the quantized weights (bitsandbytes).")
    double: bool = Field(True, description="Quantize the scales of nf4 and fp4 too.")
    block: Literal[32, 64, 128] = Field(64, description="MixtureWeights of nf4 and fp4 that share a scale.")
    rounding: Literal["nearest", "inputs"] = Field(
        "nearest",
        description="To the nearest value, or, nf4 and fp4, as suits the inputs of layers (GPTQ, GPTAQ).",
    )


class AdapterConfig(Section):
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
